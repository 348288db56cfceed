"""The shipped training file, made tiny: every stage finds what the one before left, and the files load."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from discs import WORLD, paint_sprites
from usoflow.errors import UsoflowError
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.settings import find_folders
from usoflow.training import package
from usoflow.training.plan import Plan
from usoflow.training.run import STAGES
from usoflow.training.stages import Workshop
from usoflow.training.uso_evaluate import CELLS, Contender, Given, questions

TINY = {
    "samples": 16, "batch": 8, "save_every": 16, "warmup": 8, "cached": 24, "lessons": 16, "drawn": 24,
    "rank": 8, "flow_batch": 4, "side": 64,
}  # fmt: skip
SHALLOW = "hidden = 64\ndouble = 1\nsingle = 1\n"


def tiny_plan(folder: Path) -> Plan:
    text = resources.files("usoflow.training").joinpath("configs", "pocket.toml").read_text("utf-8")
    for name, value in TINY.items():
        text = re.sub(rf"^(\w*{name}) = \d+$", rf"\1 = {value}", text, flags=re.MULTILINE)
    text = text.replace("[base]\n", f"[base]\n{SHALLOW}").replace("[16, 32, 64, 128]", "[8, 8, 16, 16]")
    text = text.replace("patch = 16", "patch = 8")
    text = text.replace('["style", 0.17], ["text", 0.1]]', '["style", 0.27]]')  # which `rewarded` has
    (folder / "tiny.toml").write_text(text)
    return Plan.read(folder / "tiny.toml")


@pytest.mark.full
def test_every_stage_follows_the_one_before(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, tiny_plan(tmp_path), torch.float32, world=WORLD)
    paint_sprites(tmp_path / "sprites")
    for name, stage in STAGES.items():
        if name not in ("render", "judge", "evaluate", "uso-judge"):
            stage(workshop)
    learnt = torch.load(tmp_path / "rewarded" / "state.pt", weights_only=True)["average"]
    written = load_file(tmp_path / package.USO_FILES["loras"])
    assert set(written) == set(learnt)
    assert all(torch.allclose(written[name].float(), learnt[name], atol=1e-3) for name in learnt)
    for folder, file in {"checkpoints": "usoflow-pocket.safetensors", **package.USO_FILES}.items():
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / file).rename(tmp_path / "models" / folder / file)
    library = ModelLibrary(Placement.choose("cpu", "fp32"))
    contender = Contender.of(find_folders(models=tmp_path / "models"), library, side=64)
    made = contender.answer(workshop.sprites, questions(WORLD, CELLS["both"], 2), Given())
    assert made.shape == (2, 64, 64, 3)


def test_without_drawings_a_stage_tells_the_first_one(tmp_path: Path) -> None:
    """And leaves nothing of gigabytes behind."""
    for stage in ("vae", "tower", "reward", "content", "judge"):
        with pytest.raises(UsoflowError, match="render") as caught:
            STAGES[stage](Workshop(tmp_path, Plan.read(None)))
        assert "usoflow train render" in caught.value.remedy
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

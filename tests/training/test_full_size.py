"""USO's stages on FLUX.1's own files: the loss falls, the base is never changed, results load as usual."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from discs import WORLD, paint_sprites
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.loading import load_flux, load_projector
from usoflow.models.lora import attach
from usoflow.training.full_size import OUTPUT, StageName, Step, Task, learn, main, run
from usoflow.training.loop import Recipe
from usoflow.training.plan import Plan
from usoflow.training.reward import RewardStage
from usoflow.training.stages import Workshop


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A work folder with drawings."""
    paint_sprites(tmp_path / "sprites")
    plan = Plan.read(None)
    return Workshop(
        tmp_path, dataclasses.replace(plan, reward=RewardStage(Recipe(64, 8, 1e-3), drawn=16)), world=WORLD
    )


def task(
    name: StageName,
    models: Path | None,
    workshop: Workshop,
    *,
    fp8: bool,
    samples: int = 12,
    rate: float = 3e-3,
) -> Task:
    recipe = Recipe(samples, 2, rate, warmup=0, steady=1.0)
    return Task(name, models, workshop, 64, fp8, lessons=2, style_tokens=4, rank=8, recipe=recipe)


@pytest.mark.parametrize("fp8", [False, True])
def test_both_stages_learn_beside_a_frozen_base(small_models: Path, workshop: Workshop, fp8: bool) -> None:
    accelerator = Accelerator(cpu=True)
    for name in ("style", "subject"):
        losses = run(task(name, small_models, workshop, fp8=fp8, samples=60), accelerator)
        assert sum(losses[-10:]) < sum(losses[:10])
    load_projector(TensorFile.open(workshop.folder / OUTPUT["style"]).component("uso_projector"))
    checkpoint = small_models / "checkpoints" / "flux1-dev-fp8.safetensors"
    flux = load_flux(TensorFile.open(checkpoint).component("flux"))
    attach(flux, TensorFile.open(workshop.folder / OUTPUT["subject"]).component("uso_lora"), 1.0)


def test_a_stage_continues_where_it_was(
    small_models: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if it had not been interrupted; and not with other settings."""
    accelerator = Accelerator(cpu=True)
    first = run(task("style", small_models, workshop, fp8=False, samples=4), accelerator)
    assert f"Read: {small_models / 'checkpoints' / 'flux1-dev-fp8.safetensors'}, " in capsys.readouterr().out
    state = torch.load(workshop.folder / "style.pt", weights_only=True)
    vectors = sum(value.ndim == 1 for value in state["step"].values())
    groups = [(group["weight_decay"], len(group["params"])) for group in state["optimiser"]["param_groups"]]
    assert groups == [(0.01, len(state["step"]) - vectors), (0.0, vectors)]
    assert vectors > 0
    second = run(task("style", small_models, workshop, fp8=False, samples=8), accelerator)
    (workshop.folder / "style.pt").unlink()
    whole = run(task("style", small_models, workshop, fp8=False, samples=8), accelerator)
    assert [*first, *second] == pytest.approx(whole, rel=1e-5)
    assert run(task("style", small_models, workshop, fp8=False, samples=8), accelerator) == []
    wider = dataclasses.replace(task("style", small_models, workshop, fp8=True), style_tokens=8)
    with pytest.raises(UsoflowError, match="other settings: fp8, style_tokens"):
        run(wider, accelerator)


def test_subject_needs_style(small_models: Path, workshop: Workshop) -> None:
    with pytest.raises(UsoflowError, match="run the stage style first"):
        run(task("subject", small_models, workshop, fp8=False), Accelerator(cpu=True))


def test_the_small_models_of_the_package_are_no_base(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USOFLOW_MODELS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsoflowError, match="only the package's own small models"):
        run(task("style", None, workshop, fp8=False), Accelerator(cpu=True))


@pytest.mark.parametrize("nan", ["loss", "gradient"])
def test_what_is_no_number_is_told_and_not_saved(tmp_path: Path, nan: str) -> None:
    learned = nn.Parameter(torch.ones(2))
    if nan == "gradient":
        learned.register_hook(lambda gradient: gradient * torch.nan)
    step = Step({"a": learned}, lambda done: learned.sum() * (torch.nan if nan == "loss" else 1))
    with pytest.raises(UsoflowError) as error:
        learn(step, Recipe(4, 4, 1e-3), Accelerator(cpu=True), tmp_path / "style.pt", {})
    assert error.value.code == "non_finite"
    assert "lower --rate" in error.value.remedy
    assert not (tmp_path / "style.pt").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--batch=0"], "batch"),
        (["--samples=0"], "samples"),
        (["--lessons=0"], "lessons"),
        (["--rank=0"], "rank"),
        (["--style-tokens=0"], "style_tokens"),
        (["--side=40"], "a multiple of 16, not 40"),
        (["--work=file"], "file is no folder that can be written to"),
    ],
)
def test_a_wrong_command_is_told(
    wrong: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["style", *wrong])
    assert said in capsys.readouterr().err


def test_precision_is_not_that_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate config` was told is in the environment of what it launches."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("usoflow.training.full_size.run", lambda _, accelerator: accelerator.mixed_precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["style", f"--work={tmp_path}"]) == "no"


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.delitem(sys.modules, "usoflow.training.full_size")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("usoflow.training.full_size", run_name="__main__")
    assert caught.value.code == 2
    assert "usoflow[train]" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("fp8", [False, True])
def test_official_width(synth_models: Path, workshop: Workshop, fp8: bool) -> None:
    """FLUX.1's width, few blocks: the same two lessons again and again are learnt."""
    name = "flux1-dev-fp8.safetensors"
    assert (synth_models / "checkpoints" / name).exists()
    for stage in ("style", "subject"):
        asked = task(stage, synth_models, workshop, fp8=fp8, samples=8, rate=1e-3)
        losses = run(asked, Accelerator(cpu=True))
        assert len(losses) == 4
        assert min(losses[2:]) < losses[0]

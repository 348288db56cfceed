"""`usoflow generate` on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shell import Done, usoflow
from usoflow.api.official import LAYOUT_NOTE
from usoflow.api.workflow import Workflow


@pytest.fixture
def small_options(small_models: Path, tmp_path: Path) -> list[str]:
    return [
        "--models", str(small_models), "--output", str(tmp_path / "out"), "--device=cpu", "--dtype=fp32",
        "--size=32x32", "--steps=1", "--subject-size=32",
    ]  # fmt: skip


@pytest.fixture
def pictures(small_models: Path) -> Path:
    return small_models.parent / "input"


def record(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_line_of_text(small_options: list[str], tmp_path: Path) -> None:
    done = usoflow("generate", "a cat", "--seed=7", *small_options)
    assert done.code == 0, done.err
    path = Path(done.out.splitlines()[0])
    assert path.parent == tmp_path / "out"
    assert "seed 7" in done.out
    assert Workflow.load(path).seeds == (7,)


def test_count_shares_encodings_and_makes_a_sheet(small_options: list[str], pictures: Path) -> None:
    done = usoflow(
        "generate", "a cat", f"--subject={pictures / 'subject.png'}", "--seed=7", "--count=3", "--sheet",
        "--json", *small_options,
    )  # fmt: skip
    found = record(done)
    assert found["seeds"] == [7, 8, 9]
    assert len(found["images"]) == 3
    ran = [{node["class_type"] for node in run["nodes"]} for run in found["runs"]]
    assert "CLIPTextEncode" in ran[0]
    assert ran[1] == ran[2] == {"KSampler", "VAEDecode", "SaveImage"}
    with Image.open(found["sheet"]) as sheet:
        assert sheet.size == (2 * 40 + 8, 2 * 68 + 8)


def test_a_sweep_is_a_grid_of_every_combination(small_options: list[str], pictures: Path) -> None:
    done = usoflow(
        "generate", "a cat", f"--subject={pictures / 'subject.png'}", "--sweep=steps=1,2",
        "--sweep=subject-size=16,32,48", "--seed=1", "--json", *small_options,
    )  # fmt: skip
    found = record(done)
    prompts = [Workflow.load(path).to_prompt() for path in found["images"]]
    tried = [(p["112:31"]["inputs"]["steps"], p["112:109"]["inputs"]["largest_size"]) for p in prompts]
    assert tried == [(1, 16), (1, 32), (1, 48), (2, 16), (2, 32), (2, 48)]
    assert Path(found["sheet"]).is_file()


def test_an_empty_prompt_is_explained(small_options: list[str], pictures: Path) -> None:
    references = [f"--subject={pictures / 'subject.png'}", f"--style={pictures / 'style.png'}"]
    assert LAYOUT_NOTE in usoflow("generate", "", *references, *small_options).out


def test_keeping_proportions_and_saving_the_workflow(
    small_options: list[str], pictures: Path, tmp_path: Path
) -> None:
    done = usoflow(
        "generate", "a cat", f"--subject={pictures / 'subject.png'}", "--keep-size", "--easycache=0.3",
        "--lora=uso-flux1-dit-lora-v1.safetensors:-0.5", f"--save-workflow={tmp_path / 'w.json'}", "--json",
        *small_options,
    )  # fmt: skip
    with Image.open(record(done)["images"][0]) as picture:
        assert picture.size == (48, 32)
    saved = json.loads((tmp_path / "w.json").read_text())
    assert "nodes" in saved  # the UI graph
    loras = [n for n in Workflow.load(tmp_path / "w.json").to_prompt().values() if "lora_name" in n["inputs"]]
    assert [node["inputs"]["strength_model"] for node in loras] == [1, -0.5]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--size=big"], 2, "--size"),
        (["--size=1000x1000"], 2, "multiples of 16"),
        (["--sweep=colour=red"], 2, "can be swept"),
        (["--sweep=steps=few"], 2, "not values"),
        (["--keep-size"], 2, "without a subject"),
        (["--subject=none.png"], 5, "none.png"),
        (["--lora=none.safetensors"], 4, "none.safetensors"),
    ],
)
def test_mistakes(small_options: list[str], arguments: list[str], code: int, said: str) -> None:
    done = usoflow("generate", "a cat", *small_options, *arguments)
    assert done.code == code
    assert said in done.err

"""The shipped pocket USO: the whole family is small, and the official graphs keep a subject with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import usoflow
from usoflow.models.checkpoint import TensorFile
from usoflow.settings import MODEL_SUFFIXES, POCKET_MODELS
from usoflow.training.package import USO_FILES

EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILY_BYTES = 32_000_000
KINDS = {"clip_vision": "siglip", "model_patches": "uso_projector", "loras": "uso_lora"}
GRAPHS = ("text", "subject", "style", "both")


def test_the_family_is_small_and_holds_what_it_should() -> None:
    files = [path for path in POCKET_MODELS.rglob("*") if path.suffix in MODEL_SUFFIXES]
    assert sum(path.stat().st_size for path in files) < FAMILY_BYTES
    for folder, kind in KINDS.items():
        assert set(TensorFile.open(POCKET_MODELS / folder / USO_FILES[folder]).components()) == {kind}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_the_official_ones_but_for_names_and_sizes(name: str) -> None:
    official, ours = (json.loads((EXAMPLES / part / f"{name}.json").read_text()) for part in (".", "pocket"))
    for path, before, after in differences(official, ours):
        if path[-1] == "models":  # where the editor would fetch the official files
            assert after is None
        elif isinstance(before, str):
            assert before.endswith(".safetensors")
            assert after.startswith("usoflow-pocket")
        else:
            assert (before, after) in ((1024, 128), (512, 128))


def differences(one: Any, two: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Where two documents differ, with both values."""
    if isinstance(one, dict) and isinstance(two, dict):
        assert set(two) <= set(one)
        for key in one:
            yield from differences(one[key], two.get(key), (*path, key))
    elif isinstance(one, list) and isinstance(two, list):
        assert len(one) == len(two)
        for number, pair in enumerate(zip(one, two, strict=True)):
            yield from differences(*pair, (*path, number))
    elif one != two:
        yield path, one, two


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[usoflow.Engine]:
    with usoflow.Engine(models=POCKET_MODELS, output=tmp_path_factory.mktemp("out"), dtype="fp32") as engine:
        yield engine


def drawn(engine: usoflow.Engine, graph: str, prompt: str, pictures: dict[str, Path]) -> np.ndarray:
    workflow = usoflow.Workflow.load(EXAMPLES / "pocket" / f"{graph}.json").with_seed(3)
    workflow = workflow.set("CLIPTextEncode.text", prompt)
    for node, path in pictures.items():
        workflow = workflow.with_picture(node, path)
    return np.asarray(engine.run(workflow).images[0], np.float32) / 255


def test_subject_is_kept_and_background_follows(engine: usoflow.Engine, tmp_path: Path) -> None:
    """A red disc and a blue one, each on black as the prompt says and not on white as in the reference."""
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 60, 220))):
        rows = np.arange(128) - 63.5
        disc = (rows[:, None] ** 2 + rows**2 < 36**2)[..., None]
        picture = np.where(disc, colour, 255).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    made = {
        name: drawn(engine, "subject", "a ball on a black background", {"47": tmp_path / f"{name}.png"})
        for name in ("red", "blue")
    }
    for name, channel, other in (("red", 0, 2), ("blue", 2, 0)):
        inside, corners = made[name][44:84, 44:84].mean(axis=(0, 1)), made[name][:10, :10].mean()
        assert inside[channel] > inside[other] + 0.15
        assert corners < 0.3


def test_style_reaches_the_picture(engine: usoflow.Engine) -> None:
    """The white lines on blue of a blueprint, and the colours of a meadow without them."""
    styles = {name: EXAMPLES / f"{name}.png" for name in ("blueprint", "pixels")}
    made = {
        name: drawn(engine, "style", "a rocket in a meadow", {"88": path, "91": path})
        for name, path in styles.items()
    }
    blue = {name: (picture[..., 2] - picture[..., 1]).mean() for name, picture in made.items()}
    assert blue["blueprint"] > blue["pixels"] + 0.1

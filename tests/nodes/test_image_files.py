"""LoadImage, SaveImage, PreviewImage: the folders, and what is shown of them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from usoflow.errors import UsoflowError
from usoflow.nodes import image
from usoflow.nodes.context import NodeContext, SavedImage
from usoflow.workflow import metadata

PICTURE = torch.linspace(0, 1, 4 * 6 * 3).reshape(1, 4, 6, 3)


def test_load_from_input(context: NodeContext) -> None:
    pixels, mask = image.load_image("subject.png", context=context)
    assert pixels.shape == (1, 48, 80, 3)
    assert pixels.dtype == mask.dtype == torch.float32
    assert mask.shape == (1, 64, 64)


@pytest.mark.parametrize(("folder", "suffix"), [("output", " [output]"), ("temp", " [temp]")])
def test_load_from_other_folders(context: NodeContext, folder: str, suffix: str) -> None:
    """As the editor names what it has just made."""
    root: Path = getattr(context.folders, folder)
    root.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(root / "made.png")
    assert image.load_image(f"made.png{suffix}", context=context)[0].shape == (1, 2, 3, 3)
    with pytest.raises(UsoflowError) as caught:
        image.load_image("made.png", context=context)
    assert caught.value.code == "image_missing"


def test_save_and_load_again(context: NodeContext) -> None:
    shown = image.save_image(PICTURE, "sub/name", context=context)
    assert shown.images == (SavedImage("name_00001_.png", "sub", "output"),)
    loaded, _ = image.load_image("sub/name_00001_.png [output]", context=context)
    assert float((loaded - PICTURE).abs().max()) < 1 / 255
    again = image.save_image(loaded, "sub/name", context=context)
    assert again.images[0].filename == "name_00002_.png"
    assert torch.equal(image.load_image("sub/name_00002_.png [output]", context=context)[0], loaded)


def test_workflow_is_embedded(context: NodeContext) -> None:
    workflow = {"nodes": [], "links": []}
    image.save_image(PICTURE, "a", context=replace(context, workflow=workflow))
    texts = metadata.read((context.folders.output / "a_00001_.png").read_bytes())
    assert json.loads(texts["workflow"]) == workflow
    assert json.loads(texts["prompt"]) == context.prompt


def test_preview_goes_to_temp(context: NodeContext) -> None:
    shown = image.preview_image(torch.cat([PICTURE, 1 - PICTURE]), context=context)
    assert [saved.type for saved in shown.images] == ["temp", "temp"]
    assert all((context.folders.temp / saved.subfolder / saved.filename).is_file() for saved in shown.images)
    assert not context.folders.output.exists()


def test_values_outside_the_range_are_clipped(context: NodeContext) -> None:
    """Bicubic scaling overshoots."""
    image.save_image(PICTURE * 3 - 1, "a", context=context)
    loaded, _ = image.load_image("a_00001_.png [output]", context=context)
    assert (loaded.min(), loaded.max()) == (0, 1)
    assert float((loaded - (PICTURE * 3 - 1).clamp(0, 1)).abs().max()) < 1 / 255 + 1e-6


def test_colour_of_an_empty_image() -> None:
    made = image.empty_image(2, 3, 4, 0xFF8000)
    assert made.shape == (4, 3, 2, 3)
    assert made[2, 1, 1].tolist() == pytest.approx([1, 128 / 255, 0])


def test_inverting_twice() -> None:
    assert torch.allclose(image.invert(image.invert(PICTURE)), PICTURE)
    assert torch.allclose(image.invert(PICTURE) + PICTURE, torch.ones(1))


def test_old_previews_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name, age in (("preview_a_00001_.png", 90_000), ("preview_b_00001_.png", 10), ("mine.png", 90_000)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    image.clear_previews(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.png", "preview_b_00001_.png"]
    image.clear_previews(tmp_path / "absent")

"""Masks from files and pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from usoflow.errors import UsoflowError
from usoflow.nodes import mask
from usoflow.settings import find_folders


@pytest.fixture
def context(tmp_path: Path) -> Any:
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[..., :] = (255, 102, 0, 51)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "glass.png")
    return SimpleNamespace(folders=find_folders(inputs=tmp_path))


@pytest.mark.parametrize(
    ("channel", "value"), [("red", 1.0), ("green", 0.4), ("blue", 0.0), ("alpha", 0.8)]
)  # alpha is turned round: what is transparent is masked
def test_loading_a_channel(context: Any, channel: str, value: float) -> None:
    loaded = mask.load_image_mask("glass.png", channel, context=context)
    assert torch.allclose(loaded, torch.full((1, 2, 3), value))


def test_the_alpha_of_an_opaque_picture_is_empty_and_of_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2)).save(tmp_path / "wall.png")
    context: Any = SimpleNamespace(folders=find_folders(inputs=tmp_path))
    assert torch.equal(mask.load_image_mask("wall.png", "alpha", context=context), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("channel", ["alpha", "red"])
def test_the_first_frame_counts(tmp_path: Path, channel: str) -> None:
    first, second = (Image.new("RGBA", (4, 2), (value, 0, 0, 255 - value)) for value in (51, 102))
    first.save(tmp_path / "moving.png", save_all=True, append_images=[second])
    context: Any = SimpleNamespace(folders=find_folders(inputs=tmp_path))
    loaded = mask.load_image_mask("moving.png", channel, context=context)
    assert torch.allclose(loaded, torch.full((1, 2, 4), 0.2))


def test_to_picture_and_back() -> None:
    source = torch.rand(2, 3, 4)
    picture = mask.mask_to_image(source)
    assert picture.shape == (2, 3, 4, 3)
    for channel in ("red", "green", "blue"):
        assert torch.equal(mask.image_to_mask(picture, channel), source)


def test_alpha_of_a_picture_without_is_an_error() -> None:
    with pytest.raises(UsoflowError) as caught:
        mask.image_to_mask(torch.zeros(1, 2, 2, 3), "alpha")
    assert caught.value.code == "channel_missing"


def test_inverting() -> None:
    assert torch.allclose(
        mask.invert_mask(torch.tensor([[[0.0, 0.25, 1.0]]])), torch.tensor([[[1, 0.75, 0]]])
    )

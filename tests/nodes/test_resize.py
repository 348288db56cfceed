"""Resizing against Pillow, averages worked out by hand, and the reference's pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from golden import synth
from golden.compare import Golden
from usoflow.errors import UsoflowError
from usoflow.nodes.resize import crop_to_proportions, resize, scale, scale_to_max_dimension

METHODS = ("area", "bilinear", "bicubic", "nearest-exact", "lanczos")


def picture(height: int, width: int, batch: int = 1) -> torch.Tensor:
    values = torch.randint(0, 256, (batch, height, width, 3), generator=torch.Generator().manual_seed(0))
    return values.float() / 255


@pytest.mark.parametrize("method", METHODS)
def test_shape_and_batch(method: str) -> None:
    image = picture(20, 30, batch=2)
    out = resize(image, 13, 17, method)
    assert out.shape == (2, 17, 13, 3)
    assert out.dtype == torch.float32
    assert torch.equal(out[1:], resize(image[1:], 13, 17, method))


@pytest.mark.parametrize("method", ["area", "bilinear", "bicubic", "nearest-exact", "lanczos"])
def test_the_same_size_is_the_same_picture(method: str) -> None:
    assert torch.allclose(resize(picture(9, 7), 7, 9, method), picture(9, 7), atol=1 / 255)


@pytest.mark.parametrize("method", METHODS)
def test_one_channel_stays_one(method: str) -> None:
    """Custom nodes make such pictures."""
    grey = picture(20, 30, batch=2)[..., :1]
    found = resize(grey, 13, 17, method)
    assert found.shape == (2, 17, 13, 1)
    assert torch.allclose(found, resize(grey.expand(-1, -1, -1, 3), 13, 17, method)[..., :1], atol=1e-6)


def test_area_averages_blocks() -> None:
    image = picture(12, 20)
    blocks = image.reshape(1, 4, 3, 5, 4, 3).mean(dim=(2, 4))
    assert torch.allclose(resize(image, 5, 4, "area"), blocks, atol=1e-6)


def test_bilinear_does_not_smooth_before_it_shrinks() -> None:
    """At a quarter of the size only the middle 2x2 of each 4x4 block counts."""
    image = picture(8, 12)
    middle = image.reshape(1, 2, 4, 3, 4, 3)[:, :, 1:3, :, 1:3].mean(dim=(2, 4))
    assert torch.allclose(resize(image, 3, 2, "bilinear"), middle, atol=1e-6)


def test_nearest_exact_equals_pillow() -> None:
    image = picture(31, 50)
    pixels = Image.fromarray((image[0] * 255).round().byte().numpy())
    expected = np.asarray(pixels.resize((17, 40), Image.Resampling.NEAREST)) / 255
    assert np.abs(resize(image, 17, 40, "nearest-exact")[0].numpy() - expected).max() < 1e-6


def test_bicubic_overshoots_and_lanczos_truncates() -> None:
    edge = torch.zeros(1, 4, 8, 3)
    edge[:, :, 4:] = 0.999
    assert float(resize(edge, 16, 8, "bicubic").max()) > 1
    assert float(resize(edge, 8, 4, "lanczos").max()) == pytest.approx(254 / 255)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 64))
def test_the_longer_side_gets_the_size(height: int, width: int, largest: int) -> None:
    image = torch.zeros(1, height, width, 3)
    expected = (round(height / width * largest), largest)
    if height > width:
        expected = (largest, round(width / height * largest))
    if 0 in expected:
        with pytest.raises(UsoflowError) as caught:
            scale_to_max_dimension(image, largest, "nearest-exact")
        assert caught.value.code == "picture_size"
    else:
        assert tuple(scale_to_max_dimension(image, largest, "nearest-exact").shape[1:3]) == expected


def test_halves_round_to_even_as_pythons_round_does() -> None:
    assert scale_to_max_dimension(picture(100, 25), 10, "area").shape[1:3] == (10, 2)  # 2.5
    assert scale_to_max_dimension(picture(35, 100), 10, "area").shape[1:3] == (4, 10)  # 3.5


def test_a_largest_size_of_zero_is_refused() -> None:
    with pytest.raises(UsoflowError, match="25x100 would become 0x0"):
        scale_to_max_dimension(picture(100, 25), 0, "area")


def test_a_side_of_zero_follows_from_the_proportions() -> None:
    image = picture(40, 60)
    assert scale(image, 30, 0, "area").shape[1:3] == (20, 30)
    assert scale(image, 0, 30, "area").shape[1:3] == (30, 45)
    assert scale(image, 0, 0, "area") is image


@pytest.mark.parametrize(
    ("size", "target", "kept"),
    [
        ((40, 60), (20, 20), (slice(0, 40), slice(10, 50))),
        ((60, 40), (80, 40), (slice(20, 40), slice(0, 40))),
    ],
)
def test_centre_crop_keeps_the_middle(
    size: tuple[int, int], target: tuple[int, int], kept: tuple[slice, slice]
) -> None:
    image = picture(*size)
    assert torch.equal(crop_to_proportions(image, *target), image[:, kept[0], kept[1]])
    cropped = scale(image, *target, "area", crop="center")
    assert torch.equal(cropped, resize(image[:, kept[0], kept[1]], *target, "area"))


@pytest.mark.parametrize("target", [(8, 16384), (16384, 8)])
def test_of_extreme_proportions_a_line_is_left(target: tuple[int, int]) -> None:
    cropped = crop_to_proportions(picture(51, 52), *target)
    assert 0 < min(cropped.shape[1:3]) <= 2


@pytest.mark.parametrize(
    ("size", "target"),
    [((40, 60), (20, 20)), ((60, 40), (80, 40)), ((48, 96), (24, 32)), ((64, 64), (32, 16))],
)
def test_centre_crop_equals_pillows_fit(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Where the crop is a whole number of pixels on each side, which Pillow's need not be.

    Nearest, since Pillow's other filters look beyond the edge of what it crops.
    """
    image = picture(*size)
    pixels = Image.fromarray((image[0] * 255).round().byte().numpy())
    fitted = np.asarray(ImageOps.fit(pixels, target, Image.Resampling.NEAREST)).astype(np.float32) / 255
    scaled = scale(image, *target, "nearest-exact", crop="center")
    assert np.allclose(scaled[0].numpy(), fitted)


def test_goldens(golden: Callable[[str], Golden]) -> None:
    reference = golden("scale")
    for name in reference.names():
        size, largest, method = name.split("_")
        height, width = (int(side) for side in size.split("x"))
        image = torch.from_numpy(synth.image(f"scale{size}", height, width).astype(np.float32) / 255)[None]
        scaled = scale_to_max_dimension(image, int(largest), method)
        tolerance = 0.0 if method in ("nearest-exact", "lanczos") else 1e-5
        report = reference.check(name, scaled.numpy(), tolerance)
        assert report["ok"], report

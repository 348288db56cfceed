"""Nodes on pictures against Pillow, numpy, and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from usoflow.nodes import image, image_scaling, image_transform
from usoflow.schema.node import AnyNode


def picture(height: int, width: int, batch: int = 1, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, channels), generator=generator).float() / 255


def pillow(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray((tensor[0] * 255).round().byte().numpy())


def as_tensor(pil: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pil).astype(np.float32) / 255)[None]


@pytest.mark.parametrize(
    ("node", "value", "operation"),
    [
        (image_transform.flip, "x-axis: vertically", Image.Transpose.FLIP_TOP_BOTTOM),
        (image_transform.flip, "y-axis: horizontally", Image.Transpose.FLIP_LEFT_RIGHT),
        (image_transform.rotate, "90 degrees", Image.Transpose.ROTATE_270),  # Pillow turns the other way
        (image_transform.rotate, "180 degrees", Image.Transpose.ROTATE_180),
        (image_transform.rotate, "270 degrees", Image.Transpose.ROTATE_90),
    ],
)
def test_turning_equals_pillow(node: AnyNode, value: str, operation: Image.Transpose) -> None:
    source = picture(4, 7)
    assert torch.allclose(node(source, value), as_tensor(pillow(source).transpose(operation)), atol=1e-6)


def test_rotating_by_nothing_is_nothing() -> None:
    source = picture(4, 7)
    assert torch.equal(image_transform.rotate(source, "none"), source)


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ({"width": 3, "height": 2, "x": 1, "y": 2}, (slice(2, 4), slice(1, 4))),
        ({"width": 99, "height": 99, "x": 5, "y": 0}, (slice(0, 4), slice(5, 7))),
        ({"width": 2, "height": 2, "x": 99, "y": 99}, (slice(3, 4), slice(6, 7))),
    ],
)
def test_crop(box: dict[str, int], kept: tuple[slice, slice]) -> None:
    source = picture(4, 7)
    assert torch.equal(image_transform.crop(source, **box), source[:, kept[0], kept[1]])


@pytest.mark.parametrize(
    ("mode", "operation"),
    [
        ("normal", lambda a, b: b),
        ("multiply", ImageChops.multiply),
        ("screen", ImageChops.screen),
        ("overlay", ImageChops.overlay),
        ("difference", ImageChops.difference),
    ],
)
def test_blending_equals_pillow(mode: str, operation: object) -> None:
    a, b = picture(5, 6), picture(5, 6, seed=1)
    expected = as_tensor(operation(pillow(a), pillow(b)))  # type: ignore[operator]
    blended = image_transform.blend(a, b, 1.0, blend_mode=mode)
    assert float((blended - expected).abs().max()) < 2.5 / 255  # Pillow rounds to 8 bits on the way
    half = image_transform.blend(a, b, 0.25, blend_mode=mode)
    assert torch.allclose(half, 0.75 * a + 0.25 * blended, atol=1e-6)


def test_soft_light_is_w3cs() -> None:
    def formula(backdrop: float, source: float) -> float:
        if source <= 0.5:
            return backdrop - (1 - 2 * source) * backdrop * (1 - backdrop)
        d = ((16 * backdrop - 12) * backdrop + 4) * backdrop if backdrop <= 0.25 else math.sqrt(backdrop)
        return backdrop + (2 * source - 1) * (d - backdrop)

    a, b = picture(9, 9), picture(9, 9, seed=1)
    expected = torch.tensor(list(map(formula, a.flatten().tolist(), b.flatten().tolist()))).reshape(a.shape)
    assert torch.allclose(image_transform.blend(a, b, 1.0, blend_mode="soft_light"), expected, atol=1e-6)


def test_blending_takes_the_size_of_the_first() -> None:
    blended = image_transform.blend(picture(5, 6), picture(20, 11, channels=4), 0.5, blend_mode="normal")
    assert blended.shape == (1, 5, 6, 3)


def test_blending_repeats_the_last_of_the_shorter_batch() -> None:
    a, b = torch.rand(3, 4, 4, 3), torch.rand(2, 4, 4, 4)
    blended = image_transform.blend(a, b, 1.0, blend_mode="normal")
    assert torch.equal(blended, b[[0, 1, 1], ..., :3])


@pytest.mark.parametrize(
    ("direction", "first", "second"),
    [
        ("right", (slice(None), slice(0, 6)), (slice(None), slice(8, 14))),
        ("left", (slice(None), slice(8, 14)), (slice(None), slice(0, 6))),
        ("down", (slice(0, 4), slice(None)), (slice(6, 10), slice(None))),
        ("up", (slice(6, 10), slice(None)), (slice(0, 4), slice(None))),
    ],
)
def test_stitching(direction: str, first: tuple[slice, slice], second: tuple[slice, slice]) -> None:
    a, b = picture(4, 6), picture(4, 6, seed=1)
    joined = image_transform.stitch(
        a, direction, spacing_width=2, spacing_color="red", match_image_size=False, image2=b
    )
    assert torch.equal(joined[:, first[0], first[1]], a)
    assert torch.equal(joined[:, second[0], second[1]], b)
    between = joined.clone()
    for place in (first, second):
        between[:, place[0], place[1]] = torch.tensor([1.0, 0, 0])
    assert torch.equal(between, torch.tensor([1.0, 0, 0]).expand_as(between))


def test_stitching_matches_the_shared_side_as_pillow_does() -> None:
    a, b = picture(8, 6), picture(4, 6, seed=1)
    joined = image_transform.stitch(a, "right", match_image_size=True, image2=b)
    expected = as_tensor(pillow(b).resize((12, 8), Image.Resampling.LANCZOS))
    assert joined.shape == (1, 8, 18, 3)
    assert float((joined[:, :, 6:] - expected).abs().max()) <= 2 / 255  # 8-bit truncation of the input


def test_stitching_leaves_a_picture_of_the_right_size_as_it_is() -> None:
    a, b = picture(8, 6), picture(8, 5, seed=1) / 3  # values that 8 bits do not have
    assert torch.equal(image_transform.stitch(a, "right", match_image_size=True, image2=b)[:, :, 6:], b)


def test_stitching_a_square_gives_a_square() -> None:
    joined = image_transform.stitch(picture(512, 6), "right", match_image_size=True, image2=picture(98, 98))
    assert joined.shape == (1, 512, 6 + 512, 3)


def test_stitching_centres_the_smaller_on_black_and_repeats_the_last_of_the_shorter_batch() -> None:
    a, b = picture(8, 2, batch=2), picture(3, 2, seed=1)
    joined = image_transform.stitch(a, "right", match_image_size=False, spacing_color="blue", image2=b)
    assert joined.shape == (2, 8, 4, 3)
    assert torch.equal(joined[:, 2:5, 2:], b.expand(2, -1, -1, -1))
    assert not joined[:, :2, 2:].any()
    assert not joined[:, 5:, 2:].any()


def test_stitching_one_picture_is_that_picture() -> None:
    source = picture(4, 6)
    assert torch.equal(image_transform.stitch(source), source)


def test_batch_scales_and_crops_the_second_and_adds_opaque_alpha() -> None:
    a, b = picture(4, 4, channels=4), torch.full((2, 8, 16, 3), 0.25)
    joined = image.batch(a, b)
    assert joined.shape == (3, 4, 4, 4)
    assert torch.equal(joined[:1], a)
    assert torch.allclose(joined[1:], torch.tensor([0.25, 0.25, 0.25, 1.0]))


def test_size() -> None:
    assert image.get_size(picture(4, 7, batch=3)) == (7, 4, 3)


def test_padding_for_outpainting() -> None:
    """The mask against its definition, pixel by pixel."""
    source = picture(20, 30)
    padded, mask = image.pad_for_outpaint(source, left=8, top=0, right=0, bottom=16, feathering=5)
    assert padded.shape == (1, 36, 38, 3)
    assert mask.shape == (1, 36, 38)
    assert torch.equal(padded[:, :20, 8:], source)
    assert torch.equal(padded[:, 20:], torch.full((1, 16, 38, 3), 0.5))
    for row in range(36):
        for column in range(38):
            inside = row < 20 and column >= 8
            distance = min(column - 8, 20 - row)  # to the left and to the bottom, the padded sides
            expected = max(0, (5 - distance) / 5) ** 2 if inside else 1.0
            assert float(mask[0, row, column]) == pytest.approx(expected, abs=1e-6)


def test_a_picture_too_small_for_the_feathering_is_not_feathered() -> None:
    _, mask = image.pad_for_outpaint(picture(20, 30), left=8, feathering=10)
    assert torch.equal(mask[0, :, 8:], torch.zeros(20, 30))


def test_scaling_by_a_factor_rounds_each_side() -> None:
    assert image_scaling.scale_by(picture(5, 7), "area", 1.5).shape == (1, 8, 10, 3)  # 7.5 and 10.5, to even


@pytest.mark.parametrize(("megapixels", "steps"), [(0.01, 1), (0.05, 16), (0.02, 8)])
def test_total_pixels(megapixels: float, steps: int) -> None:
    scaled = image_scaling.scale_to_total_pixels(picture(30, 50), "bilinear", megapixels, steps)
    _, height, width, _ = scaled.shape
    wanted = megapixels * 1024 * 1024
    assert height % steps == width % steps == 0
    assert abs(width - math.sqrt(wanted * 50 / 30)) <= steps / 2
    assert abs(height - math.sqrt(wanted * 30 / 50)) <= steps / 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 100), (1024, 1024)), ((9, 16), (752, 1392)), ((300, 10), (1568, 672)), ((80, 120), (832, 1248))],
)
def test_kontext_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Height and width: 16:9 = 1.78 lies between 1.73 (1328x768 is none; 1392x752 is 1.85) and so on."""
    assert image_scaling.kontext_scale(picture(*size)).shape[1:3] == expected
    assert all(w % 16 == h % 16 == 0 for w, h in image_scaling.KONTEXT_SIZES)


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, C] scaled: between the four nearest, without smoothing."""

    def places(new: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, old - 1), at - low

    (top, bottom, down), (left, right, across) = places(height, len(image)), places(width, image.shape[1])
    across = across[None, :, None]
    upper = image[top][:, left] * (1 - across) + image[top][:, right] * across
    lower = image[bottom][:, left] * (1 - across) + image[bottom][:, right] * across
    return upper * (1 - down[:, None, None]) + lower * down[:, None, None]


def laid_over(
    destination: np.ndarray, source: np.ndarray, x: int, y: int, mask: np.ndarray | None
) -> np.ndarray:
    """Pixel by pixel; the source and the mask, of its size, begin again where they are fewer."""
    result = destination.copy()
    for number, row, column in np.ndindex(len(destination), *source.shape[1:3]):
        if y + row < destination.shape[1] and x + column < destination.shape[2]:
            weight = 1.0 if mask is None else mask[number % len(mask), row, column]
            pixel = result[number, y + row, x + column]
            pixel[:] = (1 - weight) * pixel + weight * source[number % len(source), row, column]
    return result


@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (2, 1), (5, 3), (6, 0), (7, 4), (100, 0)])
@pytest.mark.parametrize(("height", "width", "count"), [(2, 3, 1), (9, 9, 2), (1, 1, 5)])
def test_laying_over(x: int, y: int, height: int, width: int, count: int, masks: int) -> None:
    """Also partly, and wholly, beside the destination, which is left as it was."""
    destination, source = picture(4, 7, batch=3), picture(height, width, batch=count, seed=1)
    before = destination.clone()
    mask = picture(height, width, batch=masks, channels=1, seed=2)[..., 0] if masks else None
    result = image_transform.composite(destination, source, x, y, mask=mask)
    expected = laid_over(before.numpy(), source.numpy(), x, y, None if mask is None else mask.numpy())
    assert np.allclose(result.numpy(), expected, atol=1e-6)
    assert torch.equal(destination, before)


def test_a_source_is_scaled_to_the_destination_if_asked_to_and_a_mask_to_its_source() -> None:
    destination, source, mask = (
        picture(6, 8),
        picture(3, 5, seed=1),
        picture(2, 4, channels=1, seed=2)[..., 0],
    )
    weight = bilinear(mask[0, ..., None].numpy(), 6, 8)[None, ..., 0]
    scaled = bilinear(source[0].numpy(), 6, 8)[None]
    result = image_transform.composite(destination, source, 1, 2, resize_source=True, mask=mask)
    assert np.allclose(result, laid_over(destination.numpy(), scaled, 1, 2, weight), atol=1e-5)
    weight = bilinear(mask[0, ..., None].numpy(), 3, 5)[None, ..., 0]
    result = image_transform.composite(destination, source, 1, 2, mask=mask)
    assert np.allclose(result, laid_over(destination.numpy(), source.numpy(), 1, 2, weight), atol=1e-5)


@pytest.mark.parametrize(("below", "above"), [(3, 4), (4, 3)])
def test_what_is_laid_over_gets_the_channels_of_the_destination(below: int, above: int) -> None:
    destination, source = picture(4, 4, channels=below), picture(2, 2, channels=above, seed=1)
    result = image_transform.composite(destination, source)
    assert result.shape == destination.shape
    assert torch.equal(result[:, :2, :2, :3], source[..., :3])
    assert bool((result[:, :2, :2, 3:] == 1).all())

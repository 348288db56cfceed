"""Pictures cropped, turned, put beside each other and blended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from usoflow.nodes import resize
from usoflow.nodes.image import in_turn, with_channels
from usoflow.nodes.sockets import Image, Mask
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, Int

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = Int(min=1, max=16384, step=1)
_PLACE = Int(min=0, max=16384, step=1)
_COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "white": (1.0, 1.0, 1.0),
        "black": (0.0, 0.0, 0.0),
        "red": (1.0, 0.0, 0.0),
        "green": (0.0, 1.0, 0.0),
        "blue": (0.0, 0.0, 1.0),
    }
)
_ROWS, _COLUMNS = 1, 2  # axes of an IMAGE


@node("ImageCrop", category="image/transform", display_name="Image Crop")
def crop(
    image: Image,
    width: Annotated[int, _SIDE] = 512,
    height: Annotated[int, _SIDE] = 512,
    x: Annotated[int, _PLACE] = 0,
    y: Annotated[int, _PLACE] = 0,
) -> Image:
    """Cuts a rectangle out; what would lie outside of the picture is left away."""
    top, left = min(y, image.shape[_ROWS] - 1), min(x, image.shape[_COLUMNS] - 1)
    return image[:, top : top + height, left : left + width]


@node("ImageFlip", category="image/transform")
def flip(
    image: Image, flip_method: Annotated[str, Choice(("x-axis: vertically", "y-axis: horizontally"))]
) -> Image:
    """Mirrors: upside down about the x-axis, left to right about the y-axis."""
    return image.flip(_ROWS if flip_method.startswith("x") else _COLUMNS)


@node("ImageRotate", category="image/transform")
def rotate(
    image: Image, rotation: Annotated[str, Choice(("none", "90 degrees", "180 degrees", "270 degrees"))]
) -> Image:
    """Turns clockwise."""
    quarters = 0 if rotation == "none" else int(rotation.split()[0]) // 90
    return image.rot90(quarters, (_COLUMNS, _ROWS))


@node("ImageStitch", category="image/transform", display_name="Image Stitch")
def stitch(
    image1: Image,
    direction: Annotated[str, Choice(("right", "down", "left", "up"))] = "right",
    match_image_size: bool = True,
    spacing_width: Annotated[int, Int(min=0, max=1024, step=2)] = 0,
    spacing_color: Annotated[str, Choice(tuple(_COLOURS))] = "white",
    image2: Image | None = None,
) -> Image:
    """Puts the second picture beside, below or above the first, scaled to the side they share, or centred."""
    import torch

    if image2 is None:
        return image1
    along, across = (_COLUMNS, _ROWS) if direction in ("right", "left") else (_ROWS, _COLUMNS)
    pair = _same_batch(image1, image2)
    if match_image_size:
        pair = pair[0], _scaled_to(pair[1], across, pair[0].shape[across])
    else:
        filling = _COLOURS["white" if spacing_color == "white" else "black"]
        longest = max(part.shape[across] for part in pair)
        pair = _centred(pair[0], across, longest, filling), _centred(pair[1], across, longest, filling)
    first, second = pair if direction in ("right", "down") else pair[::-1]
    size = list(first.shape)
    size[along] = spacing_width + spacing_width % 2
    return torch.cat([first, _plain(size, _COLOURS[spacing_color]), second], dim=along)


@node("ImageCompositeMasked", category="image")
def composite(
    destination: Image,
    source: Image,
    x: Annotated[int, _PLACE] = 0,
    y: Annotated[int, _PLACE] = 0,
    resize_source: bool = False,
    mask: Mask | None = None,
) -> Image:
    """Lays the source over the destination from (x, y) on; where there is a mask, as far as it says.

    What would lie outside of the destination is left away. The mask is scaled to the source.
    """
    count, height, width, channels = destination.shape
    if resize_source:
        source = resize.resize(source, width, height, "bilinear")
    source = in_turn(with_channels(source, channels), count)
    weight = _weight(mask, source)[:, : max(0, height - y), : max(0, width - x)]
    source = source[:, : weight.shape[_ROWS], : weight.shape[_COLUMNS]]
    result = destination.clone()
    under = result[:, y : y + source.shape[_ROWS], x : x + source.shape[_COLUMNS]]
    under.copy_(under * (1 - weight) + source * weight)
    return result


def _weight(mask: Tensor | None, source: Tensor) -> Tensor:
    """How much of each of the source's pixels is laid over: [B, H, W, 1]."""
    count, height, width = source.shape[:3]
    if mask is None:
        return source.new_ones(count, height, width, 1)
    single = mask.reshape(-1, mask.shape[-2], mask.shape[-1], 1)
    return in_turn(resize.resize(single, width, height, "bilinear"), count)


@node("ImageBlend", category="image/postprocessing")
def blend(
    image1: Image,
    image2: Image,
    blend_factor: Annotated[float, Float(min=0.0, max=1.0, step=0.01)] = 0.5,
    *,
    blend_mode: Annotated[
        str, Choice(("normal", "multiply", "screen", "overlay", "soft_light", "difference"))
    ],
) -> Image:
    """Blends the second picture into the first, which gives the size.

    The modes are those of W3C's Compositing and Blending Level 1 (section 10.1), with the first picture as
    backdrop and the factor as alpha.
    """
    height, width, channels = image1.shape[1:]
    if image2.shape[1:3] != image1.shape[1:3]:
        image2 = resize.scale(image2, width, height, "bicubic", crop="center")
    image1, image2 = _same_batch(image1, with_channels(image2, channels))
    mixed = _MODES[blend_mode](image1, image2)
    return (image1 * (1 - blend_factor) + mixed * blend_factor).clamp(0, 1)


def _overlay(backdrop: Tensor, source: Tensor) -> Tensor:
    """Multiply in the dark, screen in the light."""
    light = 1 - 2 * (1 - backdrop) * (1 - source)
    return (2 * backdrop * source).where(backdrop <= 0.5, light)


def _soft_light(backdrop: Tensor, source: Tensor) -> Tensor:
    """W3C's formula, in which D is a cubic in the dark that joins the square root at 1/4."""
    dark = backdrop - (1 - 2 * source) * backdrop * (1 - backdrop)
    cubic = ((16 * backdrop - 12) * backdrop + 4) * backdrop
    root = cubic.where(backdrop <= 0.25, backdrop.clamp(min=0).sqrt())
    return dark.where(source <= 0.5, backdrop + (2 * source - 1) * (root - backdrop))


_MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "normal": lambda backdrop, source: source,
        "multiply": lambda backdrop, source: backdrop * source,
        "screen": lambda backdrop, source: backdrop + source - backdrop * source,
        "overlay": _overlay,
        "soft_light": _soft_light,
        "difference": lambda backdrop, source: (backdrop - source).abs(),
    }
)


def _same_batch(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """With as many pictures (the shorter batch ends with its last one repeated) of as many channels."""
    import torch

    count, channels = max(len(first), len(second)), max(first.shape[3], second.shape[3])
    pair = (with_channels(first, channels), with_channels(second, channels))
    a, b = (torch.cat([part, part[-1:].expand(count - len(part), -1, -1, -1)]) for part in pair)
    return a, b


def _scaled_to(image: Tensor, axis: int, length: int) -> Tensor:
    """Scaled in its proportions so that the axis has this length."""
    side = image.shape[axis]
    if side == length:  # lanczos would round the values to 8 bits
        return image
    height, width = (max(1, int(length * (image.shape[a] / side))) for a in (_ROWS, _COLUMNS))
    return resize.resize(image, width, height, "lanczos")


def _centred(image: Tensor, axis: int, length: int, colour: tuple[float, ...]) -> Tensor:
    """Lengthened on both ends of the axis with a colour."""
    import torch

    missing = length - image.shape[axis]
    shapes = [list(image.shape), list(image.shape)]
    shapes[0][axis], shapes[1][axis] = missing // 2, missing - missing // 2
    return torch.cat([_plain(shapes[0], colour), image, _plain(shapes[1], colour)], dim=axis)


def _plain(shape: list[int], colour: tuple[float, ...]) -> Tensor:
    """[B, H, W, C] of one colour; further channels are opaque."""
    import torch

    channels = (*colour, 1.0)[: shape[3]]
    return torch.tensor(channels, device="cpu", dtype=torch.float32).expand(shape).contiguous()

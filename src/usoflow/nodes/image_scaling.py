"""Pictures scaled: to a size, by a factor, to a number of pixels."""

from __future__ import annotations

import math
from typing import Annotated

from usoflow.nodes import resize
from usoflow.nodes.sockets import Image
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, Int

_SIDE = Int(min=0, max=16384, step=1)
_METHODS = Choice(("nearest-exact", "bilinear", "area", "bicubic", "lanczos"))
_MEGAPIXEL = 1024 * 1024

# The sizes that FLUX.1 Kontext was trained with: `PREFERED_KONTEXT_RESOLUTIONS` of
# github.com/black-forest-labs/flux (src/flux/util.py).
KONTEXT_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip


@node("ImageScale", category="image/upscaling", display_name="Upscale Image")
def scale(
    image: Image,
    upscale_method: Annotated[str, _METHODS],
    width: Annotated[int, _SIDE] = 512,
    height: Annotated[int, _SIDE] = 512,
    *,
    crop: Annotated[str, Choice(("disabled", "center"))],
) -> Image:
    """Scales to a size; a side of 0 follows from the proportions."""
    return resize.scale(image, width, height, upscale_method, crop=crop)


@node("ImageScaleBy", category="image/upscaling", display_name="Upscale Image By")
def scale_by(
    image: Image,
    upscale_method: Annotated[str, _METHODS],
    scale_by: Annotated[float, Float(min=0.01, max=8.0, step=0.01)] = 1.0,
) -> Image:
    """Scales both sides by a factor."""
    height, width = (round(side * scale_by) for side in image.shape[1:3])
    return resize.resize(image, width, height, upscale_method)


@node("ImageScaleToTotalPixels", category="image/upscaling")
def scale_to_total_pixels(
    image: Image,
    upscale_method: Annotated[str, _METHODS],
    megapixels: Annotated[float, Float(min=0.01, max=16.0, step=0.01)] = 1.0,
    resolution_steps: Annotated[int, Int(min=1, max=256)] = 1,
) -> Image:
    """Scales to a number of pixels (1 megapixel is 1024 x 1024), each side to a multiple of the steps."""
    factor = math.sqrt(megapixels * _MEGAPIXEL / (image.shape[1] * image.shape[2]))
    height, width = (round(side * factor / resolution_steps) * resolution_steps for side in image.shape[1:3])
    return resize.resize(image, width, height, upscale_method)


@node("ImageScaleToMaxDimension", category="image/upscaling")
def scale_to_max_dimension(
    image: Image,
    upscale_method: Annotated[
        str, Choice(("area", "lanczos", "bilinear", "nearest-exact", "bilinear", "bicubic"))
    ] = "area",
    largest_size: Annotated[int, _SIDE] = 512,
) -> Image:
    """Scales so that the longer side has this many pixels."""
    return resize.scale_to_max_dimension(image, largest_size, upscale_method)


@node("FluxKontextImageScale", category="advanced/conditioning/flux")
def kontext_scale(image: Image) -> Image:
    """Scales and crops to the training size of FLUX.1 Kontext that is nearest in proportions."""
    proportions = image.shape[2] / image.shape[1]
    width, height = min(KONTEXT_SIZES, key=lambda size: abs(proportions - size[0] / size[1]))
    return resize.scale(image, width, height, "lanczos", crop="center")

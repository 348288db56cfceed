"""Pictures in, out, scaled and made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from usoflow.nodes.context import NodeContext, SavedImage, Shown
from usoflow.nodes.sockets import Image, Mask
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, InputImage, Int, Text, Tip
from usoflow.schema.values import image_location

_SIDE = Int(min=0, max=16384, step=1)
_HIDDEN = ("prompt", "extra_pnginfo")
_PREVIEW_COMPRESSION = 1  # previews are written often and kept shortly


@node("LoadImage", category="image", display_name="Load Image")
def load_image(image: Annotated[str, InputImage()], *, context: NodeContext) -> tuple[Image, Mask]:
    """Loads a picture of the input folder; the mask is its transparency."""
    import torch

    from usoflow.nodes.pictures import read_picture

    pixels, mask = read_picture(context.folders.picture(*image_location(image)))
    return torch.from_numpy(pixels), torch.from_numpy(mask)


@node("SaveImage", category="image", display_name="Save Image", output_node=True, hidden=_HIDDEN)
def save_image(
    images: Image,
    filename_prefix: Annotated[
        str, Text(), Tip("Start of the file names; may hold %date:yyyy-MM-dd% or %NODE.WIDGET%.")
    ] = "ComfyUI",
    *,
    context: NodeContext,
) -> Shown:
    """Saves pictures in the output folder, with the workflow that made them inside."""
    return _write(images, context.folders.output, "output", filename_prefix, context)


@node("PreviewImage", category="image", display_name="Preview Image", output_node=True, hidden=_HIDDEN)
def preview_image(images: Image, *, context: NodeContext) -> Shown:
    """Shows pictures without keeping them."""
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    prefix = f"preview_{digest}"
    return _write(images, context.folders.temp, "temp", prefix, context, compression=_PREVIEW_COMPRESSION)


@node("ImageScale", category="image/upscaling", display_name="Upscale Image")
def scale(
    image: Image,
    upscale_method: Annotated[str, Choice(("nearest-exact", "bilinear", "area", "bicubic", "lanczos"))],
    width: Annotated[int, _SIDE] = 512,
    height: Annotated[int, _SIDE] = 512,
    *,
    crop: Annotated[str, Choice(("disabled", "center"))],
) -> Image:
    """Scales to a size; a side of 0 follows from the proportions."""
    from usoflow.nodes import resize

    return resize.scale(image, width, height, upscale_method, crop=crop)


@node("ImageScaleToMaxDimension", category="image/upscaling")
def scale_to_max_dimension(
    image: Image,
    upscale_method: Annotated[
        str, Choice(("area", "lanczos", "bilinear", "nearest-exact", "bilinear", "bicubic"))
    ] = "area",
    largest_size: Annotated[int, _SIDE] = 512,
) -> Image:
    """Scales so that the longer side has this many pixels."""
    from usoflow.nodes import resize

    return resize.scale_to_max_dimension(image, largest_size, upscale_method)


@node("ImageInvert", category="image", display_name="Invert Image")
def invert(image: Image) -> Image:
    """Turns every colour into its opposite."""
    return 1.0 - image


@node("EmptyImage", category="image")
def empty_image(
    width: Annotated[int, Int(min=1, max=16384, step=1)] = 512,
    height: Annotated[int, Int(min=1, max=16384, step=1)] = 512,
    batch_size: Annotated[int, Int(min=1, max=4096)] = 1,
    color: Annotated[int, Int(min=0, max=0xFFFFFF, step=1, display="color")] = 0,
) -> Image:
    """A picture of one colour (0xRRGGBB)."""
    import torch

    channels = [(color >> shift & 0xFF) / 255 for shift in (16, 8, 0)]
    return torch.tensor(channels).expand(batch_size, height, width, 3).contiguous()


def _write(
    images: Image, root: Path, folder: str, prefix: str, context: NodeContext, *, compression: int = 4
) -> Shown:
    from usoflow.nodes.pictures import write_pictures

    paths = write_pictures(
        images.cpu().numpy(),
        root,
        prefix,
        prompt=context.prompt,
        workflow=context.workflow,
        compression=compression,
    )
    subfolders = ("" if str(path.parent) == "." else str(path.parent) for path in paths)
    return Shown(tuple(SavedImage(p.name, s, folder) for p, s in zip(paths, subfolders, strict=True)))

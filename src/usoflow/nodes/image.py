"""Pictures in, out, made and put together."""

from __future__ import annotations

import glob
import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from usoflow.nodes import resize
from usoflow.nodes.context import PREVIEW_PREFIX, NodeContext, SavedImage, Shown
from usoflow.nodes.feather import margin_mask
from usoflow.nodes.sockets import Image, Mask
from usoflow.schema.node import node
from usoflow.schema.specs import InputImage, Int, Text, Tip
from usoflow.schema.values import image_location

if TYPE_CHECKING:
    from torch import Tensor

PREVIEWS_KEPT = 24 * 3600.0  # seconds

_PADDING = Int(min=0, max=16384, step=8)
_HIDDEN = ("prompt", "extra_pnginfo")
_GREY = 0.5  # what stands where nothing is painted yet
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
    digest = hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()[:16]
    prefix = f"{PREVIEW_PREFIX}{digest}"
    return _write(images, context.folders.temp, "temp", prefix, context, compression=_PREVIEW_COMPRESSION)


def clear_previews(temp: Path) -> None:
    """Remove PreviewImage's pictures of before yesterday: another process may show newer ones."""
    for name in glob.glob(f"{PREVIEW_PREFIX}*.png", root_dir=temp):
        picture = temp / name
        with suppress(OSError):
            if time.time() - picture.stat().st_mtime > PREVIEWS_KEPT:
                picture.unlink()


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
    return (
        torch.tensor(channels, device="cpu", dtype=torch.float32)
        .expand(batch_size, height, width, 3)
        .contiguous()
    )


@node("ImageBatch", category="image", display_name="Batch Images", deprecated=True)
def batch(image1: Image, image2: Image) -> Image:
    """Puts pictures behind each other; those of `image2` are scaled and cropped to the size of `image1`."""
    import torch

    height, width = image1.shape[1:3]
    if image2.shape[1:3] != image1.shape[1:3]:
        image2 = resize.scale(image2, width, height, "bilinear", crop="center")
    channels = max(image1.shape[3], image2.shape[3])
    return torch.cat([with_channels(image, channels) for image in (image1, image2)])


@node(
    "GetImageSize",
    category="image",
    display_name="Get Image Size",
    output_names=("width", "height", "batch_size"),
    hidden=("unique_id",),
)
def get_size(image: Image) -> tuple[int, int, int]:
    """Width, height and number of pictures."""
    count, height, width = image.shape[:3]
    return width, height, count


@node("ImagePadForOutpaint", category="image", display_name="Pad Image for Outpainting")
def pad_for_outpaint(
    image: Image,
    left: Annotated[int, _PADDING] = 0,
    top: Annotated[int, _PADDING] = 0,
    right: Annotated[int, _PADDING] = 0,
    bottom: Annotated[int, _PADDING] = 0,
    feathering: Annotated[int, Int(min=0, max=16384, step=1)] = 40,
) -> tuple[Image, Mask]:
    """Adds grey margins; the mask is 1 there and falls off within the picture along them."""
    from torch.nn import functional as F

    sides = (left, right, top, bottom)
    padded = F.pad(image, (0, 0, *sides), value=_GREY)
    inner = margin_mask((image.shape[1], image.shape[2]), sides, feathering)
    return padded, F.pad(inner, sides, value=1.0)[None]


def with_channels(image: Image, channels: int) -> Image:
    """The picture with this many channels: opaque alpha is added, what is too much left away."""
    from torch.nn import functional as F

    return F.pad(image, (0, channels - image.shape[3]), value=1.0)


def in_turn(batch: Tensor, count: int) -> Tensor:
    """So many of a batch, from its first again where they are too few: [count, ...]."""
    return batch.repeat(-(-count // len(batch)), *[1] * (batch.ndim - 1))[:count]


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
        reserve=context.reserve,
    )
    subfolders = ("" if str(path.parent) == "." else str(path.parent) for path in paths)
    return Shown(tuple(SavedImage(p.name, s, folder) for p, s in zip(paths, subfolders, strict=True)))

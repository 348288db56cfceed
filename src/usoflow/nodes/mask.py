"""Masks: from files and pictures, to pictures. A MASK is float32 [B, H, W] in 0..1."""

from __future__ import annotations

from typing import Annotated

from usoflow.errors import UsoflowError
from usoflow.nodes.context import NodeContext
from usoflow.nodes.sockets import Image, Mask
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, InputImage
from usoflow.schema.values import image_location

_CHANNELS = ("red", "green", "blue", "alpha")


@node("LoadImageMask", category="mask", display_name="Load Image (as Mask)")
def load_image_mask(
    image: Annotated[str, InputImage()],
    channel: Annotated[str, Choice(("alpha", "red", "green", "blue"))],
    *,
    context: NodeContext,
) -> Mask:
    """Loads one channel of a picture, of its first frame; of alpha, the mask is the transparency."""
    import torch

    from usoflow.nodes.pictures import read_picture

    frames, masks = read_picture(context.folders.picture(*image_location(image)))
    pixels, transparency = torch.from_numpy(frames[:1]), torch.from_numpy(masks[:1])
    if channel != "alpha":
        return pixels[..., _CHANNELS.index(channel)]
    is_opaque = transparency.shape != pixels.shape[:3]  # then the mask is of a size of its own
    return pixels.new_zeros(pixels.shape[:3]) if is_opaque else transparency


@node("MaskToImage", category="mask", display_name="Convert Mask to Image")
def mask_to_image(mask: Mask) -> Image:
    """Makes a grey picture of a mask."""
    return mask.reshape(-1, mask.shape[-2], mask.shape[-1], 1).expand(-1, -1, -1, 3)


@node("ImageToMask", category="mask", display_name="Convert Image to Mask")
def image_to_mask(image: Image, channel: Annotated[str, Choice(_CHANNELS)]) -> Mask:
    """Takes one channel of a picture as a mask."""
    index = _CHANNELS.index(channel)
    if index >= image.shape[3]:
        raise UsoflowError("channel_missing", f"The picture has {image.shape[3]} channels, and no {channel}.")
    return image[..., index]


@node("InvertMask", category="mask")
def invert_mask(mask: Mask) -> Mask:
    """Inverts a mask."""
    return 1.0 - mask

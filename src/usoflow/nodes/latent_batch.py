"""Latents scaled, taken out of batches, repeated and masked.

A LATENT may also carry `noise_mask` [B, H, W] in pixels (what is made anew) and `batch_index` (its pictures'
places in the batch that they were drawn in, so that each keeps its noise).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from usoflow.nodes.image import in_turn
from usoflow.nodes.resize import bislerp, crop_to_proportions, resize
from usoflow.nodes.sockets import Latent, Mask
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, Int

if TYPE_CHECKING:
    from torch import Tensor

_METHODS = Choice(("nearest-exact", "bilinear", "area", "bicubic", "bislerp"))
_PIXELS = Int(min=0, max=16384, step=8)
_DOWN = 8  # pixels per latent along one side
_LEAST = 64  # pixels of a side that follows from the other


@node("LatentUpscale", category="latent", display_name="Upscale Latent")
def upscale(
    samples: Latent,
    upscale_method: Annotated[str, _METHODS],
    width: Annotated[int, _PIXELS] = 512,
    height: Annotated[int, _PIXELS] = 512,
    *,
    crop: Annotated[str, Choice(("disabled", "center"))],
) -> Latent:
    """Scales latents to a size in pixels; a side of 0 follows from the proportions."""
    if width == height == 0:
        return samples
    planes = samples["samples"].movedim(1, -1)  # [B, H, W, C], as pictures are
    rows, columns = planes.shape[1:3]
    width, height = (max(_LEAST, side) if side else 0 for side in (width, height))
    height = height or max(_LEAST, round(rows * width / columns))
    width = width or max(_LEAST, round(columns * height / rows))
    if crop == "center":
        planes = crop_to_proportions(planes, width, height)
    return {**samples, "samples": _resized(planes, width // _DOWN, height // _DOWN, upscale_method)}


@node("LatentUpscaleBy", category="latent", display_name="Upscale Latent By")
def upscale_by(
    samples: Latent,
    upscale_method: Annotated[str, _METHODS],
    scale_by: Annotated[float, Float(min=0.01, max=8.0, step=0.01)] = 1.5,
) -> Latent:
    """Scales latents by a factor."""
    planes = samples["samples"].movedim(1, -1)
    height, width = (round(side * scale_by) for side in planes.shape[1:3])
    return {**samples, "samples": _resized(planes, width, height, upscale_method)}


@node("LatentFromBatch", category="latent/batch", display_name="Latent From Batch")
def from_batch(
    samples: Latent,
    batch_index: Annotated[int, Int(min=0, max=63)] = 0,
    length: Annotated[int, Int(min=1, max=64)] = 1,
) -> Latent:
    """Takes latents out of a batch; each keeps the noise of its place."""
    count = len(samples["samples"])
    first = min(batch_index, count - 1)
    taken = slice(first, min(first + length, count))
    places = samples.get("batch_index", list(range(count)))
    found = {**samples, "samples": samples["samples"][taken].clone(), "batch_index": places[taken]}
    mask = samples.get("noise_mask")
    if mask is not None and len(mask) > 1:
        found["noise_mask"] = _repeated(mask, count)[taken].clone()
    return found


@node("RepeatLatentBatch", category="latent/batch", display_name="Repeat Latent Batch")
def repeat_batch(samples: Latent, amount: Annotated[int, Int(min=1, max=64)] = 1) -> Latent:
    """Repeats the whole batch; each copy gets noise of its own."""
    count = len(samples["samples"])
    found = {**samples, "samples": samples["samples"].repeat(amount, 1, 1, 1)}
    mask = samples.get("noise_mask")
    if mask is not None and len(mask) > 1:
        found["noise_mask"] = _repeated(mask, count).repeat(amount, 1, 1)
    if places := samples.get("batch_index"):
        step = max(places) - min(places) + 1
        found["batch_index"] = [place + copy * step for copy in range(amount) for place in places]
    return found


@node("SetLatentNoiseMask", category="latent/inpaint", display_name="Set Latent Noise Mask")
def set_noise_mask(samples: Latent, mask: Mask) -> Latent:
    """Only what is in the mask is made anew."""
    return {**samples, "noise_mask": mask.reshape(-1, mask.shape[-2], mask.shape[-1])}


def _resized(planes: Tensor, width: int, height: int, method: str) -> Tensor:
    """[B, H, W, C] to [B, C, height, width]."""
    scaled = bislerp(planes, width, height) if method == "bislerp" else resize(planes, width, height, method)
    return scaled.movedim(-1, 1).contiguous()


def _repeated(mask: Tensor, count: int) -> Tensor:
    """The masks in turn, `count` of them: [count, H, W]."""
    return in_turn(mask.reshape(-1, *mask.shape[-2:]), count)

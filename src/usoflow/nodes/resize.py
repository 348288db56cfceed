"""Scaling of IMAGE tensors, for the scaling nodes: the filters of the reference, aliasing included.

An IMAGE is float32 [B, H, W, C] in 0..1. Results are not clamped: bicubic overshoots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    from torch import Tensor


def scale(image: Tensor, width: int, height: int, method: str, *, crop: str = "disabled") -> Tensor:
    """ImageScale: to width x height; one side of 0 follows from the proportions, both keep the picture.

    Args:
        image: [B, H, W, C].
        width: in pixels, >= 0.
        height: in pixels, >= 0.
        method: see `resize`.
        crop: "center" first cuts the picture about its centre to the proportions of the result.

    Returns:
        [B, height, width, C].
    """
    if width == height == 0:
        return image
    rows, columns = image.shape[1:3]
    width = width or max(1, round(columns * height / rows))
    height = height or max(1, round(rows * width / columns))
    if crop == "center":
        image = crop_to_proportions(image, width, height)
    return resize(image, width, height, method)


def scale_to_max_dimension(image: Tensor, largest_size: int, method: str) -> Tensor:
    """ImageScaleToMaxDimension: the longer side becomes `largest_size`, up or down.

    Raises:
        UsoflowError: "picture_size" if the shorter side would become 0.
    """
    rows, columns = image.shape[1:3]
    if rows > columns:
        return resize(image, round(columns / rows * largest_size), largest_size, method)
    return resize(image, largest_size, round(rows / columns * largest_size), method)


def crop_to_proportions(image: Tensor, width: int, height: int) -> Tensor:
    """The largest part about the centre of [B, H, W, C] with the proportions width : height."""
    rows, columns = image.shape[1:3]
    left = min(max(0, round((columns - rows * width / height) / 2)), (columns - 1) // 2)
    top = min(max(0, round((rows - columns * height / width) / 2)), (rows - 1) // 2)
    return image[:, top : rows - top, left : columns - left]


def resize(image: Tensor, width: int, height: int, method: str) -> Tensor:
    """[B, H, W, C] to [B, height, width, C].

    Args:
        image: float32.
        width: in pixels.
        height: in pixels.
        method: "area", "bilinear", "bicubic", "nearest-exact" (torch's filters, which do not smooth before
            they shrink) or "lanczos" (Pillow's, which does, on 8-bit values).

    Raises:
        UsoflowError: "picture_size" if a side is 0.
    """
    _refuse_nothing(image, width, height)
    if method == "lanczos":
        return _lanczos(image, width, height)
    from torch.nn import functional as F

    planes = F.interpolate(image.movedim(-1, 1), size=(height, width), mode=method)
    return planes.movedim(1, -1).contiguous()


def _refuse_nothing(image: Tensor, width: int, height: int) -> None:
    if min(width, height) < 1:
        rows, columns = image.shape[1:3]
        raise UsoflowError("picture_size", f"A picture of {columns}x{rows} would become {width}x{height}.")


def _lanczos(image: Tensor, width: int, height: int) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image

    from usoflow.nodes.pictures import in_8_bits

    pictures = in_8_bits(image.cpu().numpy())
    scaled = [np.asarray(one.resize((width, height), Image.Resampling.LANCZOS)) for one in pictures]
    return torch.from_numpy(np.stack(scaled).astype(np.float32) / 255).reshape(
        -1, height, width, image.shape[-1]
    )


def bislerp(image: Tensor, width: int, height: int) -> Tensor:
    """Bilinear in the length of the feature vectors, spherical in their direction.

    Between two vectors the direction turns at a constant rate (slerp: Shoemake 1985, "Animating rotation with
    quaternion curves") while the length changes linearly, so that latents in between stay as long as their
    neighbours. First along the rows, then along the columns; sample positions are those of "bilinear".

    Args:
        image: [B, H, W, C].
        width: of the result.
        height: of the result.

    Returns:
        [B, height, width, C].

    Raises:
        UsoflowError: "picture_size" if a side is 0.
    """
    _refuse_nothing(image, width, height)
    along_columns = _slerp_axis(image, 2, width)
    return _slerp_axis(along_columns, 1, height)


def _slerp_axis(image: Tensor, axis: int, length: int) -> Tensor:
    import torch

    size = image.shape[axis]
    places = (torch.arange(length, device="cpu", dtype=torch.float64) + 0.5) * size / length - 0.5
    places = places.clamp(0, size - 1)
    lower = places.floor().long()
    upper = (lower + 1).clamp(max=size - 1)
    shape = [1] * image.ndim
    shape[axis] = length
    part = (places - lower).to(image.dtype).reshape(shape)
    return _slerp(image.index_select(axis, lower), image.index_select(axis, upper), part)


def _slerp(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    """Between vectors in the last axis; linear where they are parallel, opposite or zero."""
    import torch

    long_a, long_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    unit_a, unit_b = a / long_a.clamp(min=1e-12), b / long_b.clamp(min=1e-12)
    angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    turned = (((1 - part) * angle).sin() * unit_a + (part * angle).sin() * unit_b) / sine.clamp(min=1e-6)
    stretched = turned * ((1 - part) * long_a + part * long_b)
    curved = (sine > 1e-4) & (long_a > 0) & (long_b > 0)
    return torch.where(curved, stretched, (1 - part) * a + part * b)

"""Soft masks for `ImagePadForOutpaint`: where new paint blends into a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def margin_mask(size: tuple[int, int], sides: tuple[int, int, int, int], feathering: int) -> Tensor:
    """How much of a picture is painted anew along its padded sides.

    (1 - d / feathering)^2 at a distance of d pixels from the nearest padded side, 0 beyond `feathering`.
    A picture that is not longer than twice the feathering has no mask at all.

    Args:
        size: height and width.
        sides: padding at left, right, top, bottom; a side without is not feathered.
        feathering: in pixels.

    Returns:
        float32 [height, width].
    """
    import torch

    height, width = size
    if not 0 < 2 * feathering < min(size):
        return torch.zeros(size, device="cpu", dtype=torch.float32)
    left, right, top, bottom = sides
    columns = _distance(width, before=left > 0, after=right > 0)
    rows = _distance(height, before=top > 0, after=bottom > 0)
    nearest = torch.minimum(rows[:, None], columns[None])
    return ((feathering - nearest) / feathering).clamp(min=0) ** 2


def _distance(length: int, *, before: bool, after: bool) -> Tensor:
    """Of each of a row's pixels from the nearer of its padded ends: float32 [length]."""
    import torch

    index = torch.arange(length, device="cpu", dtype=torch.float32)
    far = torch.full_like(index, float("inf"))
    return torch.minimum(index if before else far, length - index if after else far)

"""A picture or latent worked on in overlapping tiles: for the tiled VAE nodes, and where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """How tiles lie, in latents.

    Attributes:
        tile: side of a tile.
        overlap: how far neighbours reach into each other, less than `tile`.
        before: rows of the input per latent (8 for pictures).
        after: rows of the result per latent.
    """

    tile: int
    overlap: int
    before: int
    after: int

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Begin and end of the tiles along a side; the last ends with it."""
        starts = range(0, max(1, length - self.overlap), self.tile - self.overlap)
        ends = [min(length, start + self.tile) for start in starts]
        return [(max(0, end - self.tile), end) for end in ends]


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, grid: Grid | None) -> Tensor:
    """`function` tile by tile; where tiles overlap, the one fades into the other linearly.

    Args:
        function: [B, C, h * before, w * before] -> [B, C', h * after, w * after].
        x: [B, C, H * before, W * before].
        grid: how tiles lie; None is all of it at once.

    Returns:
        [B, C', H * after, W * after].
    """
    if grid is None:
        return function(x)
    rows, columns = (side // grid.before for side in x.shape[-2:])
    total: Tensor | None = None
    for (top, bottom), (left, right) in product(grid.spans(rows), grid.spans(columns)):
        b, a = grid.before, grid.after
        result = function(x[..., top * b : bottom * b, left * b : right * b])
        if total is None:
            weights = result.new_zeros(rows * grid.after, columns * grid.after)
            total = result.new_zeros(*result.shape[:2], *weights.shape)
        weight = (_ramp(bottom - top, grid)[:, None] * _ramp(right - left, grid)).to(weights)
        place = (..., slice(top * a, bottom * a), slice(left * a, right * a))
        total[place] += result * weight
        weights[place] += weight
    assert total is not None
    return total / weights


def _ramp(length: int, grid: Grid) -> Tensor:
    """Weight along a tile: rises over the overlap, falls likewise; never 0."""
    import torch

    index = torch.arange(length * grid.after, device="cpu", dtype=torch.float32) + 0.5
    rise = max(1, grid.overlap * grid.after)
    return torch.minimum(index, index.flip(0)).div(rise).clamp(max=1)

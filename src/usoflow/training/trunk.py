"""What the encoders that look at subjects begin with: those of content reward and of the judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Trunk(nn.Module):
    """Strided convolutions with a residual layer at each size.

    Args:
        widths: channels at each size, half of the one before on a side.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = zip((3, *widths[:-1]), widths, strict=True)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 5 if a == 3 else 3, 2, 1 + (a == 3)) for a, b in pairs)
        self.same = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in (*widths, *widths))

    def at_each_size(self, x: Tensor) -> list[Tensor]:
        """What the layers see in pictures [B, 3, S, S] in -1..1, [B, width, s, s] each."""
        found = []
        for number, (down, same) in enumerate(zip(self.down, self.same, strict=True)):
            x = F.silu(self.norms[number](down(x)))
            x = x + F.silu(self.norms[len(self.down) + number](same(x)))
            found.append(x)
        return found

"""The noise of a run: the one it starts from, and the one some samplers add at each step.

All of it is drawn on the CPU, so that a seed gives the same picture on every device, and from generators
of our own: the process-wide one is left alone. The numbers are those of torch.manual_seed + torch.randn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SEEDS = 2**64  # a seed is an unsigned 64-bit number

StepNoise = Callable[[Tensor], Tensor]
"""Fresh noise ~ N(0, 1) shaped like its argument, on its device."""


def initial_noise(shape: Sequence[int], seed: int, *, batch_index: Sequence[int] | None = None) -> Tensor:
    """The noise that a run starts from.

    Args:
        shape: [B, C, H, W].
        seed: 0..2**64 - 1.
        batch_index: B places within a larger batch of the same seed, for latents taken out of one
            (LatentFromBatch); place n gets the n-th picture drawn. Without it the batch is one draw.

    Returns:
        float32, on the CPU.
    """
    generator = _generator(seed)
    if batch_index is None:
        return _drawn(shape, generator)
    one = (1, *shape[1:])
    drawn = [_drawn(one, generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([drawn[index] for index in batch_index])


def step_noise(seed: int) -> StepNoise:
    """The noise of a stochastic sampler: a stream of its own, one seed further than the initial noise."""
    generator = _generator((seed + 1) % SEEDS)

    def draw(like: Tensor) -> Tensor:
        return _drawn(like.shape, generator).to(like.device)

    return draw


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The same numbers whatever device and dtype a program has made torch's defaults."""
    return torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)

"""From the model's velocity to the estimate of the picture that samplers work with.

Built per run by the sampling nodes from one velocity per conditioning; called by samplers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from usoflow.sampling.step_cache import StepCache, Velocity


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) on the estimates of x0.

    Attributes:
        positive: the velocity towards what is wanted.
        negative: the velocity towards what is not; needed only where `cfg` is not 1.
        cfg: how far to go from the negative estimate towards, and beyond, the positive one; at 1 the
            negative would cancel out and is not evaluated.
        step_cache: skips evaluations, if given; belongs to one run.
    """

    positive: Velocity
    negative: Velocity | None = None
    cfg: float = 1.0
    step_cache: StepCache | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [B, C, H, W] float32, sigma [] -> estimate of x0, like x."""
        velocities = [self.positive]
        if self.negative is not None and not math.isclose(self.cfg, 1.0):
            velocities.append(self.negative)
        positive, *negative = (x - v * sigma for v in self._evaluate(velocities, x, sigma))
        return negative[0] + (positive - negative[0]) * self.cfg if negative else positive

    def _evaluate(self, velocities: list[Velocity], x: Tensor, sigma: Tensor) -> list[Tensor]:
        on_device = sigma.to(x.device)
        if self.step_cache is None:
            return [velocity(x, on_device) for velocity in velocities]
        return self.step_cache.evaluate(velocities, x, on_device)

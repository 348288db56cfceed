"""EasyCache: skips evaluations of the model while little changes.

Zhou et al. 2025, "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching"
(arXiv:2507.02860): how much the velocity changes is predicted from how much the input changed, with the
rate seen when the model last ran. `EasyCacheSettings` is set by the node; a `StepCache` belongs to one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from usoflow.sampling.schedule import FluxSchedule

Velocity = Callable[[Tensor, Tensor], Tensor]
"""x [B, C, H, W] float32 and sigma [] float32 on x's device -> dx / dsigma, like x."""

SUBSAMPLE = 8  # change is measured on every 8th row and column


@dataclass(frozen=True, slots=True)
class EasyCacheSettings:
    """The widgets of the EasyCache node.

    Attributes:
        reuse_threshold: relative change of the velocity, summed up over skipped steps, below which a step
            is skipped.
        start_percent: part of the run (0..1) before which nothing is skipped.
        end_percent: part of the run after which nothing is skipped.
        verbose: whether the run's decisions are logged.
    """

    reuse_threshold: float = 0.2
    start_percent: float = 0.15
    end_percent: float = 0.95
    verbose: bool = False


@dataclass(frozen=True, slots=True)
class StepDecision:
    """One call: at which sigma, whether it was skipped, and the change summed up since the model last ran."""

    sigma: float
    skipped: bool
    cumulative: float


@dataclass(frozen=True, slots=True)
class StepCacheReport:
    """What the cache decided in a run, call by call (samplers of second order call twice per step)."""

    decisions: tuple[StepDecision, ...]

    @property
    def skipped(self) -> int:
        """How many calls were skipped."""
        return sum(decision.skipped for decision in self.decisions)


@dataclass(frozen=True, slots=True)
class _LastRun:
    """The model's last evaluation within the window, subsampled."""

    x: Tensor
    velocity: Tensor
    scale: float  # mean |velocity|
    rate: float | None  # change of the velocity per change of x; known from the second evaluation on


@dataclass(slots=True)
class StepCache:
    """The state of one run.

    Steps may be skipped within a window of sigmas. Before it the difference velocity - x is kept, which is
    what a skipped step reuses; within it the change is measured too; after it nothing is done. The window's
    ends are rounded to float32 like the schedule, for steps of the official settings lie exactly on them.

    The first velocity decides and the others follow: between them only the prompt differs.
    """

    settings: EasyCacheSettings
    schedule: FluxSchedule
    _last: _LastRun | None = None
    _cumulative: float = 0.0
    _differences: list[Tensor] = field(default_factory=list)
    _decisions: list[StepDecision] = field(default_factory=list)

    @property
    def report(self) -> StepCacheReport:
        """The decisions so far."""
        return StepCacheReport(tuple(self._decisions))

    def evaluate(self, velocities: Sequence[Velocity], x: Tensor, sigma: Tensor) -> list[Tensor]:
        """The velocities at x and sigma, or what stands in for them.

        Args:
            velocities: the same ones, in the same order, in every call of a run.
            x: [B, C, H, W] float32.
            sigma: [] float32.

        Returns:
            One tensor like x per velocity.
        """
        begun = self._reached(self.settings.start_percent, sigma)
        ended = self._reached(self.settings.end_percent, sigma)
        if begun and not ended and self._may_skip(x):
            results = [x + difference for difference in self._differences]
            self._decide(sigma, skipped=True)
            return results
        results = [velocity(x, sigma) for velocity in velocities]
        if not ended:
            self._differences = [result - x for result in results]
        if begun and not ended:
            self._remember(x, results[0])
        self._decide(sigma, skipped=False)
        return results

    def _reached(self, percent: float, sigma: Tensor) -> bool:
        level = torch.tensor(self.schedule.percent_to_sigma(percent), device="cpu", dtype=torch.float32)
        return bool(sigma.cpu() <= level)

    def _may_skip(self, x: Tensor) -> bool:
        """Sums up the predicted relative change of the velocity; starts anew once it is too much."""
        if self._last is None or self._last.rate is None:
            return False
        self._cumulative += self._last.rate * _distance(_subsampled(x), self._last.x) / self._last.scale
        if self._cumulative < self.settings.reuse_threshold:
            return True
        self._cumulative = 0.0
        return False

    def _remember(self, x: Tensor, velocity: Tensor) -> None:
        here, there = _subsampled(x), _subsampled(velocity)
        rate = None
        if self._last is not None and (moved := _distance(here, self._last.x)) > 0:
            rate = _distance(there, self._last.velocity) / moved
        scale = float(velocity.abs().mean())
        self._last = _LastRun(here, there, scale, rate if scale > 0 else None)

    def _decide(self, sigma: Tensor, *, skipped: bool) -> None:
        self._decisions.append(StepDecision(float(sigma), skipped, self._cumulative))


def _subsampled(x: Tensor) -> Tensor:
    return x[..., ::SUBSAMPLE, ::SUBSAMPLE].clone()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())

"""Noise levels: FLUX's time shift, and the schedulers that choose which levels a run visits.

Called by the sampling nodes with the widget values of KSampler or BasicScheduler; the result goes to
`denoise.sample`. Everything is float32 on the CPU: step boundaries of other nodes (EasyCache) lie exactly
on these values, so the rounding is part of the definition.

A noise level sigma is the weight of the noise: x = (1 - sigma) * picture + sigma * noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from usoflow.errors import UsoflowError

TABLE_SIZE = 10_000  # the reference's resolution of time; `simple`, `beta`, `ddim_uniform` pick from it
KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
QUADRATIC_FROM = 0.025  # how much noise Mochi's linear half removes
FULL_DENOISE = 0.9999
MOST_SHIFT = 80.0
MOST_STEPS = 100_000  # ten times the largest widget; a schedule of more would be made for minutes
_CPU32: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are set to


@dataclass(frozen=True, slots=True)
class FluxSchedule:
    """FLUX.1's map from time (1 = noise, 0 = picture) to sigma.

    sigma(t) = e^shift / (e^shift + 1/t - 1), from `time_shift` of github.com/black-forest-labs/flux with a
    fixed shift: it does not follow the resolution.
    """

    shift: float = 1.15

    def sigma(self, t: Tensor) -> Tensor:
        """Sigma at times `t` in (0, 1], same shape and dtype."""
        factor = self._factor
        return factor / (factor + (1 / t - 1))

    @property
    def _factor(self) -> float:
        """e^shift, where float32 has it: beyond, all levels are 1, or but for the first 0, anyway."""
        return math.exp(max(-MOST_SHIFT, min(MOST_SHIFT, self.shift)))

    @property
    def table(self) -> Tensor:
        """Sigma at t = i / 10000, i = 1..10000, ascending; float32 [10000]."""
        return self.sigma(torch.arange(1, TABLE_SIZE + 1, **_CPU32) / TABLE_SIZE)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma after `percent` (0..1) of the run, in float64."""
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        factor = self._factor
        return factor / (factor + (1 / (1 - percent) - 1))


Scheduler = Callable[[FluxSchedule, int], Tensor]


def sigmas(name: str, steps: int, denoise: float, *, schedule: FluxSchedule) -> Tensor:
    """The sigmas (noise levels) of a run, descending.

    Args:
        name: a key of `SCHEDULERS`.
        steps: how many steps to take, >= 1.
        denoise: 1 starts from pure noise; less takes the last `steps` of int(steps / denoise) steps;
            0 gives none at all.
        schedule: the model's time shift.

    Returns:
        float32 [steps + 1] ending in 0, or [0]. As in the reference `ddim_uniform` may give more than
        asked for, and `beta` fewer, where two of them would be the same.

    Raises:
        UsoflowError: `prompt_invalid` where denoise is so small that the schedule would be endless.
    """
    if denoise <= 0.0:
        return torch.empty(0, **_CPU32)
    if denoise > FULL_DENOISE:
        return SCHEDULERS[name](schedule, steps)
    whole = steps / denoise
    if not whole <= MOST_STEPS:
        raise UsoflowError(
            "prompt_invalid",
            f"{steps} steps at a denoise of {denoise:g} need {whole:.0f} in all, more than {MOST_STEPS}.",
            remedy="Use a larger denoise, or 0 to leave the latent as it is.",
        )
    return SCHEDULERS[name](schedule, int(whole))[-(steps + 1) :]


def window(sigmas: Tensor, first: int, last: int, *, leftover: bool) -> Tensor:
    """The sigmas of the steps first..last of a run (`last` is not run).

    Args:
        sigmas: [steps + 1], descending.
        first: number of the first step, from 0.
        last: number of the step to stop before; a number beyond the run's end is its end.
        leftover: keep the noise at the end; else the last step goes to 0.

    Returns:
        [last - first + 1], or nothing where there is no step.
    """
    if last < len(sigmas) - 1:
        sigmas = sigmas[: last + 1]
        if not leftover:
            sigmas = torch.cat([sigmas[:-1], torch.zeros(1, **_CPU32)])
    return sigmas[first:] if first < len(sigmas) - 1 else torch.empty(0, **_CPU32)


def resolution_shift(width: int, height: int, *, base: float, most: float) -> float:
    """FLUX's time shift for a resolution: linear in the number of image tokens, base at 256, most at 4096.

    `get_lin_function` of github.com/black-forest-labs/flux (src/flux/sampling.py); a token is 16x16 pixels.
    """
    tokens = width * height / 16**2
    return base + (most - base) * (tokens - 256) / (4096 - 256)


def simple(schedule: FluxSchedule, steps: int) -> Tensor:
    """Every (10000 / steps)-th entry of the table, from the top."""
    picks = [-(1 + int(i * TABLE_SIZE / steps)) for i in range(steps)]
    return _ending_in_zero(schedule.table[picks])


def sgm_uniform(schedule: FluxSchedule, steps: int) -> Tensor:
    """Equal steps from the first to the last level, shifted; the last is left out for 0."""
    first, last = _extremes(schedule)
    return _ending_in_zero(schedule.sigma(torch.linspace(first, last, steps + 1, **_CPU32)[:-1]))


def normal(schedule: FluxSchedule, steps: int) -> Tensor:
    """Equal steps from the first to the last level, shifted, then 0."""
    first, last = _extremes(schedule)
    return _ending_in_zero(schedule.sigma(torch.linspace(first, last, steps, **_CPU32)))


def karras(schedule: FluxSchedule, steps: int) -> Tensor:
    """Karras et al. 2022 (arXiv:2206.00364), equation 5 with rho = 7."""
    first, last = (level ** (1 / KARRAS_RHO) for level in _extremes(schedule))
    return _ending_in_zero((first + torch.linspace(0, 1, steps, **_CPU32) * (last - first)) ** KARRAS_RHO)


def exponential(schedule: FluxSchedule, steps: int) -> Tensor:
    """Equal steps of log sigma."""
    first, last = _extremes(schedule)
    return _ending_in_zero(torch.linspace(math.log(first), math.log(last), steps, **_CPU32).exp())


def ddim_uniform(schedule: FluxSchedule, steps: int) -> Tensor:
    """Every (10000 // steps)-th entry of the table from its second one, hence sometimes one more."""
    return _ending_in_zero(schedule.table[1 :: max(TABLE_SIZE // steps, 1)].flip(0))


def beta(schedule: FluxSchedule, steps: int) -> Tensor:
    """Quantiles of the Beta(0.6, 0.6) distribution (Lee et al. 2024, arXiv:2407.12173)."""
    levels = 1 - torch.arange(steps, device="cpu", dtype=torch.float64) / steps
    indices = (symmetric_beta_quantile(levels, BETA_SHAPE) * (TABLE_SIZE - 1)).round().long()
    return _ending_in_zero(schedule.table[torch.unique_consecutive(indices)])


def linear_quadratic(schedule: FluxSchedule, steps: int) -> Tensor:
    """Genmo's schedule of Mochi 1 (`linear_quadratic_schedule` of github.com/genmoai/mochi).

    Half of the steps remove 2.5 % of the noise in equal parts; the other half follow the parabola that
    continues them with the same slope and ends at 0.
    """
    if steps == 1:
        return torch.tensor([1.0, 0.0], **_CPU32)
    linear = steps // 2
    curved = steps - linear
    slope = QUADRATIC_FROM / linear
    curvature = (1 - QUADRATIC_FROM - slope * curved) / curved**2
    i = torch.arange(steps, device="cpu", dtype=torch.float64)
    return _ending_in_zero(1 - slope * i - curvature * (i - linear).clamp(min=0) ** 2)


def kl_optimal(schedule: FluxSchedule, steps: int) -> Tensor:
    """The closed form that minimises an upper bound of the KL divergence on Gaussian data.

    Sabour et al. 2024, "Align Your Steps" (arXiv:2404.14507), theorem 3.1: equal steps of arctan sigma.
    """
    first, last = (math.atan(level) for level in _extremes(schedule))
    return _ending_in_zero(torch.tan(torch.linspace(first, last, steps, **_CPU32)))


def symmetric_beta_quantile(p: Tensor, a: float) -> Tensor:
    """The inverse of the cumulative distribution of Beta(a, a), to about 1e-12.

    Bisection on the power series of the incomplete beta function (DLMF 8.17.7 with 15.2.1), which below
    the median halves with every term.

    Args:
        p: probabilities in 0..1, float64 [N].
        a: shape parameter, > 0.

    Returns:
        float64 [N] in 0..1.
    """
    n = torch.arange(64, device=p.device, dtype=torch.float64)
    coefficients = torch.cumprod(torch.cat([n.new_ones(1), (n[1:] - a) / n[1:]]), 0) / (a + n)
    half_mass = (0.5**a * (coefficients * 0.5**n)).sum()  # the mass below the median, unnormalised
    target = 2 * half_mass * torch.minimum(p, 1 - p)
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    for _ in range(48):
        middle = (low + high) / 2
        mass = middle**a * (torch.linalg.vander(middle, N=len(n)) @ coefficients)
        low, high = torch.where(mass < target, middle, low), torch.where(mass < target, high, middle)
    return torch.where(p > 0.5, 1 - high, high)


def _extremes(schedule: FluxSchedule) -> tuple[float, float]:
    """The highest and the lowest level of the table."""
    table = schedule.table
    return float(table[-1]), float(table[0])


def _ending_in_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels.float(), torch.zeros(1, **_CPU32)])


SCHEDULERS: Mapping[str, Scheduler] = MappingProxyType(
    {
        "simple": simple,
        "sgm_uniform": sgm_uniform,
        "karras": karras,
        "exponential": exponential,
        "ddim_uniform": ddim_uniform,
        "beta": beta,
        "normal": normal,
        "linear_quadratic": linear_quadratic,
        "kl_optimal": kl_optimal,
    }
)

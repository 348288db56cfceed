"""A run, guidance and the step cache on small velocities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.sampling.denoise import StepReport, sample
from usoflow.sampling.guidance import Guidance
from usoflow.sampling.noise import initial_noise, step_noise
from usoflow.sampling.samplers import SAMPLERS, Denoise, euler
from usoflow.sampling.schedule import FluxSchedule, sigmas
from usoflow.sampling.step_cache import EasyCacheSettings, StepCache

SHAPE = (1, 16, 16, 24)
FLUX = FluxSchedule()


def run(denoise: Denoise, levels: Tensor, latent: Tensor | None = None, watch=lambda report: None) -> Tensor:
    return sample(
        denoise, euler, levels,
        noise=initial_noise(SHAPE, 3), latent=torch.zeros(SHAPE) if latent is None else latent,
        step_noise=step_noise(3), watch=watch,
    )  # fmt: skip


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(x + sigma) * 0.7 + 0.3 * x


class Counted:
    """A velocity that counts its calls."""

    def __init__(self, offset: float = 0.0) -> None:
        self.calls = 0
        self.offset = offset

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return velocity(x, sigma) + self.offset


def test_starts_between_latent_and_noise() -> None:
    latent, seen = torch.randn(SHAPE), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return x

    levels = torch.tensor([0.6, 0.3])
    run(denoise, levels, latent)
    assert torch.allclose(seen[0], 0.6 * initial_noise(SHAPE, 3) + 0.4 * latent, atol=1e-6)


def test_ending_early_scales_the_signal_back() -> None:
    """x = (1 - sigma) x0 + sigma n is handed on as x0 + sigma / (1 - sigma) n."""
    target = torch.randn(SHAPE)
    out = run(lambda x, sigma: target, torch.tensor([1.0, 0.6, 0.25]))
    assert torch.allclose(out, target + 0.25 / 0.75 * initial_noise(SHAPE, 3), atol=1e-5)


@pytest.mark.parametrize("levels", [torch.empty(0), torch.tensor([0.5])])
def test_no_steps_leave_the_latent_alone(levels: Tensor) -> None:
    latent = torch.randn(SHAPE)
    assert run(lambda x, sigma: x * torch.nan, levels, latent) is latent


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_levels_that_repeat_are_one(name: str) -> None:
    """As `simple` has them beyond 10000 steps, of which a denoise of 0.01 takes the last."""
    levels, reports = sigmas("simple", 200, 0.01, schedule=FLUX), []
    assert len(levels.unique()) < len(levels)
    found = sample(
        velocity, SAMPLERS[name], levels, noise=initial_noise(SHAPE, 3), latent=torch.zeros(SHAPE),
        step_noise=step_noise(3), watch=reports.append,
    )  # fmt: skip
    assert bool(found.isfinite().all())
    assert len(reports) == len(levels.unique()) - 1


def test_every_step_is_reported() -> None:
    reports: list[StepReport] = []
    levels = sigmas("simple", 4, 1.0, schedule=FLUX)
    out = run(Guidance(velocity), levels, watch=reports.append)
    assert [(r.index, r.total) for r in reports] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [r.sigma for r in reports] == levels[:-1].tolist()
    assert torch.allclose(reports[-1].denoised, out, atol=1e-6)


def test_non_finite_values_name_the_step() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return velocity(x, sigma) / (0.0 if sigma < 0.8 else 1.0)

    with pytest.raises(UsoflowError, match="step 3 of 4") as caught:
        run(Guidance(broken), sigmas("simple", 4, 1.0, schedule=FLUX))
    assert caught.value.code == "non_finite"


def test_guidance_extrapolates_the_estimates() -> None:
    x, sigma = torch.randn(SHAPE), torch.tensor(0.7)
    positive, negative = Counted(0.4), Counted(-0.2)
    guided = Guidance(positive, negative, cfg=3.0)(x, sigma)
    estimates = x - 0.7 * positive(x, sigma), x - 0.7 * negative(x, sigma)
    assert torch.allclose(guided, estimates[1] + 3.0 * (estimates[0] - estimates[1]), atol=1e-5)


@pytest.mark.parametrize("cfg", [1.0, 1.0 + 1e-12])
def test_guidance_of_one_does_not_run_the_negative(cfg: float) -> None:
    negative = Counted()
    Guidance(velocity, negative, cfg=cfg)(torch.randn(SHAPE), torch.tensor(0.5))
    assert negative.calls == 0


def easy_cache_by_the_rule(x: Tensor, levels: Tensor, threshold: float) -> tuple[Tensor, list[int]]:
    """EasyCache written out straight, for the official 20 steps: active in steps 4 to 18."""
    skipped, previous, rate, cumulative, difference = [], None, None, 0.0, None
    for i in range(20):
        sampled = x[:, :, ::8, ::8]
        skip = False
        if 4 <= i <= 18 and rate is not None:
            cumulative += rate * (sampled - previous[0]).abs().mean() / previous[2]
            skip = bool(cumulative < threshold)
        v = x + difference if skip else velocity(x, levels[i])
        if not skip and i <= 18:
            difference = v - x
            if i >= 4:
                cumulative = 0.0 if rate is not None else cumulative
                if previous is not None:
                    rate = (v[:, :, ::8, ::8] - previous[1]).abs().mean() / (
                        sampled - previous[0]
                    ).abs().mean()
                previous = (sampled, v[:, :, ::8, ::8], v.abs().mean())
        skipped.append(int(skip))
        x = x + v * (levels[i + 1] - levels[i])
    return x, skipped


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
def test_step_cache_follows_the_rule(threshold: float) -> None:
    levels = sigmas("simple", 20, 1.0, schedule=FLUX)
    cache, counted = StepCache(EasyCacheSettings(threshold), FLUX), Counted()
    out = run(Guidance(counted, step_cache=cache), levels)
    expected, skipped = easy_cache_by_the_rule(initial_noise(SHAPE, 3), levels, threshold)
    assert [int(d.skipped) for d in cache.report.decisions] == skipped
    assert 0 < cache.report.skipped == 20 - counted.calls
    assert torch.allclose(out, expected, atol=1e-5)


def test_a_threshold_of_zero_changes_nothing() -> None:
    levels = sigmas("simple", 20, 1.0, schedule=FLUX)
    cache = StepCache(EasyCacheSettings(0.0), FLUX)
    assert torch.equal(run(Guidance(velocity, step_cache=cache), levels), run(Guidance(velocity), levels))
    assert cache.report.skipped == 0


def test_the_window_bounds_what_is_skipped() -> None:
    levels = sigmas("simple", 20, 1.0, schedule=FLUX)
    for start, end in ((0.15, 0.95), (0.5, 0.8), (0.0, 1.0)):
        cache = StepCache(EasyCacheSettings(100.0, start, end), FLUX)
        run(Guidance(velocity, step_cache=cache), levels)
        window = [d.sigma for d in cache.report.decisions if d.skipped]
        low, high = (np.float32(FLUX.percent_to_sigma(p)) for p in (end, start))
        inside = [s for s in levels[:-1].tolist() if low < s <= high]
        assert window == inside[2:], "all but the two evaluations that tell the rate"


def test_the_first_velocity_decides_for_all() -> None:
    levels = sigmas("simple", 20, 1.0, schedule=FLUX)
    cache = StepCache(EasyCacheSettings(0.1), FLUX)
    positive, negative = Counted(), Counted(0.5)
    run(Guidance(positive, negative, cfg=2.0, step_cache=cache), levels)
    assert positive.calls == negative.calls == 20 - cache.report.skipped
    assert cache.report.skipped > 0


def test_skipped_steps_reuse_each_velocitys_own_difference() -> None:
    cache = StepCache(EasyCacheSettings(3.0, 0.0, 1.0), FLUX)
    velocities = [lambda x, sigma: x + 1.0 * sigma, lambda x, sigma: x + 2.0 * sigma]
    for step, sigma in enumerate((0.9, 0.8)):
        cache.evaluate(velocities, torch.full(SHAPE, float(step)), torch.tensor(sigma))
    first, second = cache.evaluate(velocities, torch.full(SHAPE, 5.0), torch.tensor(0.7))
    assert cache.report.decisions[-1].skipped
    assert torch.allclose(first, torch.full(SHAPE, 5.8))
    assert torch.allclose(second, torch.full(SHAPE, 6.6))


def test_a_model_that_stands_still_is_run() -> None:
    """No change and no velocity: the rule would divide by zero."""
    cache = StepCache(EasyCacheSettings(1.0, 0.0, 1.0), FLUX)
    x = torch.zeros(SHAPE)
    for sigma in (0.9, 0.8, 0.7, 0.6):
        (v,) = cache.evaluate([lambda x, sigma: x * 0], x, torch.tensor(sigma))
        assert torch.equal(v, x)
    assert cache.report.skipped == 0

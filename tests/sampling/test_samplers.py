"""Samplers against the exact solution on Gaussian data, diffusers, and formulas of the papers.

For data ~ N(m, s^2) and x = (1 - t) x0 + t n everything is known: E[x0 | x], and the ODE carries
x - (1 - t) m in proportion to the standard deviation of x at t.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from usoflow.sampling.noise import step_noise
from usoflow.sampling.samplers import SAMPLERS
from usoflow.sampling.schedule import FluxSchedule, sigmas

MEAN, DEVIATION = 1.5, 0.4
FIRST, LAST = 0.9, 0.2
STOCHASTIC = ("euler_ancestral", "lcm")
SECOND_ORDER = ("heun", "dpmpp_2m", "res_multistep")


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x], in float64."""
    t = sigma.double()
    gain = (1 - t) * DEVIATION**2 / ((1 - t) ** 2 * DEVIATION**2 + t**2)
    return MEAN + gain * (x - (1 - t) * MEAN)


def deviation_at(t: float) -> float:
    return math.hypot((1 - t) * DEVIATION, t)


def exact(x: Tensor, first: float, last: float) -> Tensor:
    return (1 - last) * MEAN + (x - (1 - first) * MEAN) * deviation_at(last) / deviation_at(first)


def run(name: str, x: Tensor, levels: Tensor, denoise=gaussian, seed: int = 0) -> Tensor:
    return SAMPLERS[name](denoise, x, levels, noise=step_noise(seed), on_step=lambda index, denoised: None)


def error(name: str, steps: int) -> float:
    x = torch.linspace(-2, 3, 11, dtype=torch.float64).reshape(1, 1, 1, 11)
    levels = torch.linspace(FIRST, LAST, steps + 1, dtype=torch.float64)
    return float((run(name, x, levels) - exact(x, FIRST, LAST)).abs().max())


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(STOCHASTIC)))
def test_order_of_convergence(name: str) -> None:
    order = math.log2(error(name, 100) / error(name, 200))
    assert order == pytest.approx(2 if name in SECOND_ORDER else 1, abs=0.1)


def test_euler_ancestral_keeps_the_marginals_to_first_order() -> None:
    """Its result is distributed like the data, up to an error that halves with the step."""

    def sampled(steps: int) -> Tensor:
        start = torch.randn(1, 1, 100, 300, generator=torch.Generator().manual_seed(5))
        levels = sigmas("simple", steps, 1.0, schedule=FluxSchedule())
        return run("euler_ancestral", start, levels, lambda x, t: gaussian(x, t).float())

    coarse, fine = sampled(50), sampled(200)
    assert float(fine.mean()) == pytest.approx(MEAN, abs=0.01)
    order = math.log((DEVIATION - float(coarse.std())) / (DEVIATION - float(fine.std())), 4)
    assert order == pytest.approx(0.85, abs=0.2)


def test_lcm_noises_each_estimate_afresh() -> None:
    levels = torch.tensor([0.9, 0.5, 0.0])
    x = torch.randn(1, 1, 2, 3, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(1, 1, 2, 3, generator=torch.Generator().manual_seed(4))
    between = 0.5 * gaussian(x, levels[0]) + 0.5 * noise
    assert torch.allclose(run("lcm", x, levels, seed=3), gaussian(between, levels[1]), atol=1e-6)


def nonlinear(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(x * 1.3 + 0.2) * (1 - sigma * 0.3)


def test_euler_equals_diffusers() -> None:
    oracle = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    oracle.set_timesteps(sigmas=[1.0, 0.7, 0.4, 0.1], mu=1.15)
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = start
    for t, sigma in zip(oracle.timesteps, oracle.sigmas, strict=False):
        x = oracle.step((x - nonlinear(x, sigma)) / sigma, t, x).prev_sample
    assert torch.allclose(run("euler", start, oracle.sigmas, nonlinear), x, atol=1e-5)
    assert torch.allclose(run("ddim", start, oracle.sigmas, nonlinear), x, atol=1e-5)


def test_heun_equals_diffusers() -> None:
    oracle = FlowMatchHeunDiscreteScheduler()
    oracle.set_timesteps(5)
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = start
    for t in oracle.timesteps:
        sigma = t / 1000
        x = oracle.step((x - nonlinear(x, sigma)) / sigma, t, x).prev_sample
    levels = torch.unique_consecutive(oracle.sigmas)
    assert len(levels) == 6
    assert torch.allclose(run("heun", start, levels, nonlinear), x, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_ends_on_the_last_estimate(name: str) -> None:
    """At sigma 0 there is only x0: whatever the method, its last step lands on an estimate of it."""
    estimates: list[Tensor] = []
    indices: list[int] = []

    def watch(index: int, denoised: Tensor) -> None:
        indices.append(index)
        estimates.append(denoised)

    start = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    levels = sigmas("simple", 5, 1.0, schedule=FluxSchedule())
    out = SAMPLERS[name](nonlinear, start, levels, noise=step_noise(1), on_step=watch)
    assert indices == [0, 1, 2, 3, 4]
    assert torch.allclose(out, estimates[-1], atol=1e-6)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_the_callback_raises_ends_the_run(name: str) -> None:
    class CancelledError(Exception):
        pass

    def cancel(index: int, denoised: Tensor) -> None:
        if index == 2:
            raise CancelledError

    calls = []
    levels = sigmas("simple", 5, 1.0, schedule=FluxSchedule())
    with pytest.raises(CancelledError):
        SAMPLERS[name](
            lambda x, s: calls.append(float(s)) or nonlinear(x, s),
            torch.ones(1, 1, 2, 2), levels, noise=step_noise(1), on_step=cancel,
        )  # fmt: skip
    assert min(calls) == pytest.approx(float(levels[2]))

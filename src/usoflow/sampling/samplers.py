"""Samplers: ways to integrate from noise to picture.

Each is the algorithm and nothing else: a function of a denoiser, called by `denoise.sample`. In the
notation of all of them, x = (1 - sigma) x0 + sigma n, the denoiser estimates x0, and the probability-flow
ODE is dx/dsigma = (x - x0) / sigma, as in Karras et al. 2022 (arXiv:2206.00364) whose algorithms therefore
carry over unchanged; only noise added on the way must respect the shrinking weight 1 - sigma of x0.

Sigmas are 0-dim float32 tensors on the CPU, so that looking at one never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from usoflow.sampling.noise import StepNoise

Denoise = Callable[[Tensor, Tensor], Tensor]
"""x [B, C, H, W] and sigma [] -> the estimate of x0, like x."""

OnStep = Callable[[int, Tensor], None]
"""Called once per step with its index and its estimate of x0. What it raises ends the run."""


class Sampler(Protocol):
    """x [B, C, H, W] float32 at sigmas[0] -> x at sigmas[-1]; sigmas float32 [steps + 1], descending."""

    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: StepNoise, on_step: OnStep
    ) -> Tensor: ...


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: StepNoise, on_step: OnStep) -> Tensor:
    """Euler's method: Karras et al. 2022, algorithm 2 without its second-order correction."""
    for i, (sigma, following) in enumerate(pairwise(sigmas.unbind())):
        denoised = denoise(x, sigma)
        on_step(i, denoised)
        x = x + _slope(x, denoised, sigma) * (following - sigma)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: StepNoise, on_step: OnStep) -> Tensor:
    """Heun's method: Karras et al. 2022, algorithm 2 without churn. Two evaluations per step but the last."""
    for i, (sigma, following) in enumerate(pairwise(sigmas.unbind())):
        denoised = denoise(x, sigma)
        on_step(i, denoised)
        slope = _slope(x, denoised, sigma)
        guess = x + slope * (following - sigma)
        if following == 0:
            x = guess
        else:
            slope_there = _slope(guess, denoise(guess, following), following)
            x = x + (slope + slope_there) / 2 * (following - sigma)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: StepNoise, on_step: OnStep
) -> Tensor:
    """Euler's method beyond the next level, then noise to come back to it.

    The level stepped to, following^2 / sigma, is `get_ancestral_step` of github.com/crowsonkb/k-diffusion
    with eta = 1. There x is scaled so that x0 weighs 1 - following, as it does at the next level, and noise
    is added up to that level's variance.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas.unbind())):
        denoised = denoise(x, sigma)
        on_step(i, denoised)
        down = following**2 / sigma
        x = x + _slope(x, denoised, sigma) * (down - sigma)
        if following > 0:
            rescale = (1 - following) / (1 - down)
            x = rescale * x + (following**2 - (rescale * down) ** 2).sqrt() * noise(x)
    return x


def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: StepNoise, on_step: OnStep) -> Tensor:
    """Multistep consistency sampling: Song et al. 2023 (arXiv:2303.01469), algorithm 1.

    Each estimate of x0 is noised afresh to the next level.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas.unbind())):
        denoised = denoise(x, sigma)
        on_step(i, denoised)
        x = denoised
        if following > 0:
            x = (1 - following) * x + following * noise(x)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: StepNoise, on_step: OnStep) -> Tensor:
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), algorithm 2, with lambda = -log sigma.

    That is the paper's x-space of a variance-exploding process, which the reference uses for FLUX too.
    """
    previous: Tensor | None = None
    for i, (sigma, following) in enumerate(pairwise(sigmas.unbind())):
        denoised = denoise(x, sigma)
        on_step(i, denoised)
        target = denoised
        if previous is not None and following > 0:
            r = (sigmas[i - 1] / sigma).log() / (sigma / following).log()
            target = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        x = following / sigma * x + (1 - following / sigma) * target
        previous = denoised
    return x


def res_multistep(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: StepNoise, on_step: OnStep
) -> Tensor:
    """The refined exponential solver of order 2 as a multistep method.

    Zhang et al. 2023 (arXiv:2308.02157), equations 21 and following, with the previous estimate of x0 as
    the second stage, as NVIDIA's Cosmos does (`res_x0_rk2_step` of github.com/nvidia-cosmos).
    """
    previous: Tensor | None = None
    for i, (sigma, following) in enumerate(pairwise(sigmas.unbind())):
        denoised = denoise(x, sigma)
        on_step(i, denoised)
        if previous is None or following == 0:
            x = x + _slope(x, denoised, sigma) * (following - sigma)
        else:
            h = (sigma / following).log()
            c2 = -(sigmas[i - 1] / sigma).log() / h
            phi1 = -torch.expm1(-h) / h
            phi2 = (1 - phi1) / h
            x = torch.exp(-h) * x + h * ((phi1 - phi2 / c2) * denoised + phi2 / c2 * previous)
        previous = denoised
    return x


def _slope(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """dx / dsigma."""
    return (x - denoised) / sigma


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": euler,
        "heun": heun,
        "euler_ancestral": euler_ancestral,
        "dpmpp_2m": dpmpp_2m,
        "lcm": lcm,
        "ddim": euler,  # DDIM (arXiv:2010.02502) is Euler's method in this parametrisation
        "res_multistep": res_multistep,
    }
)

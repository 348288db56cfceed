"""One run: noise and latent in, denoised latent out.

The sampling nodes call `sample` with what the other modules here give: sigmas (`schedule`), noise
(`noise`), an algorithm (`samplers`) and a denoiser (`guidance.Guidance`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.sampling.noise import StepNoise
from usoflow.sampling.samplers import Denoise, Sampler


@dataclass(frozen=True, slots=True)
class StepReport:
    """Progress: step `index` (from 0) of `total`, at `sigma`, estimates x0 as `denoised`."""

    index: int
    total: int
    sigma: float
    denoised: Tensor


Watch = Callable[[StepReport], None]
"""Called after every step's estimate; what it raises ends the run."""


@torch.no_grad()
def sample(
    denoise: Denoise,
    sampler: Sampler,
    sigmas: Tensor,
    *,
    noise: Tensor,
    latent: Tensor,
    step_noise: StepNoise,
    watch: Watch,
    mask: Tensor | None = None,
) -> Tensor:
    """Denoise `latent` from sigmas[0] to sigmas[-1].

    Args:
        denoise: the model with its guidance.
        sampler: the algorithm.
        sigmas: float32 [steps + 1], descending, on the CPU; [0] or [1] means that there is nothing to do.
        noise: [B, C, H, W] float32, on the device that computes.
        latent: like noise, in the model's scale (an empty latent is zeros in that scale).
        step_noise: for stochastic samplers.
        watch: told of each step.
        mask: [B or 1, 1, H, W] in 0..1, how much of each place is made anew; None is all of everything.

    Returns:
        Like noise. If sigmas does not end at 0, the noise that is left in it is part of it.

    Raises:
        UsoflowError: "non_finite", naming the step.
    """
    sigmas = sigmas.unique_consecutive()  # a very long schedule repeats some, between which nothing is done
    total = len(sigmas) - 1
    if total < 1:
        return latent

    def on_step(index: int, denoised: Tensor) -> None:
        sigma = float(sigmas[index])
        if not bool(torch.isfinite(denoised).all()):
            raise UsoflowError(
                "non_finite",
                f"Sampling gave values that are not finite: step {index + 1} of {total}, sigma {sigma:.4f}.",
            )
        watch(StepReport(index, total, sigma, denoised))

    x = sigmas[0] * noise + (1 - sigmas[0]) * latent
    if mask is not None:
        denoise = _within(mask, denoise, noise, latent)
    x = sampler(denoise, x, sigmas, noise=step_noise, on_step=on_step)
    return x / (1 - sigmas[-1])


def _within(mask: Tensor, denoise: Denoise, noise: Tensor, latent: Tensor) -> Denoise:
    """The denoiser that works within the mask only.

    As in RePaint (Lugmayr et al. 2022, arXiv:2201.09865), what is kept enters each evaluation as the known
    latent at that noise level; and its estimate is the latent itself, so that it ends unchanged.
    """

    def masked(x: Tensor, sigma: Tensor) -> Tensor:
        known = sigma * noise + (1 - sigma) * latent
        estimate = denoise(x * mask + known * (1 - mask), sigma)
        return estimate * mask + latent * (1 - mask)

    return masked

"""Sampling taken apart: noise, guider, sampler and noise levels each have a node."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from usoflow.nodes.context import NodeContext
from usoflow.nodes.handles import GuiderHandle, NoiseHandle
from usoflow.nodes.sampling import SAMPLER_NAMES, SCHEDULER_NAMES, SEED
from usoflow.nodes.sockets import Conditioning, Guider, Latent, Model, Noise, Sampler, Sigmas
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, Int

_SHIFT = Float(min=0.0, max=100.0, step=0.01)
_SIDE = Int(min=16, max=16384, step=8)


@node("ModelSamplingFlux", category="advanced/model")
def model_sampling_flux(
    model: Model,
    max_shift: Annotated[float, _SHIFT] = 1.15,
    base_shift: Annotated[float, _SHIFT] = 0.5,
    width: Annotated[int, _SIDE] = 1024,
    height: Annotated[int, _SIDE] = 1024,
) -> Model:
    """Shifts the noise schedule as the resolution asks for."""
    from usoflow.sampling.schedule import resolution_shift

    return replace(model, shift=resolution_shift(width, height, base=base_shift, most=max_shift))


@node("KSamplerSelect", category="sampling/custom_sampling/samplers")
def select_sampler(sampler_name: Annotated[str, Choice(SAMPLER_NAMES)]) -> Sampler:
    """Selects the sampling algorithm."""
    return sampler_name


@node("BasicScheduler", category="sampling/custom_sampling/schedulers")
def basic_scheduler(
    model: Model,
    scheduler: Annotated[str, Choice(SCHEDULER_NAMES)],
    steps: Annotated[int, Int(min=1, max=10000)] = 20,
    denoise: Annotated[float, Float(min=0.0, max=1.0, step=0.01)] = 1.0,
) -> Sigmas:
    """The noise levels (sigmas) of a run."""
    from usoflow.nodes.denoising import schedule_of
    from usoflow.sampling.schedule import sigmas

    # `ddim_uniform` may give more sigmas than asked for, which KSampler takes and this node does not.
    return sigmas(scheduler, steps, denoise, schedule=schedule_of(model))[-(steps + 1) :]


@node(
    "SplitSigmas",
    category="sampling/custom_sampling/sigmas",
    output_names=("high_sigmas", "low_sigmas"),
)
def split_sigmas(sigmas: Sigmas, step: Annotated[int, Int(min=0, max=10000)] = 0) -> tuple[Sigmas, Sigmas]:
    """Splits sigmas in two; the one between the parts belongs to both."""
    return sigmas[: step + 1], sigmas[step:]


@node("BasicGuider", category="sampling/custom_sampling/guiders")
def basic_guider(model: Model, conditioning: Conditioning) -> Guider:
    """Guides the model by one conditioning."""
    return GuiderHandle(model, conditioning)


@node("CFGGuider", category="sampling/custom_sampling/guiders")
def cfg_guider(
    model: Model,
    positive: Conditioning,
    negative: Conditioning,
    cfg: Annotated[float, Float(min=0.0, max=100.0, step=0.1, round=0.01)] = 8.0,
) -> Guider:
    """Guides the model towards one conditioning and away from another (classifier-free guidance)."""
    return GuiderHandle(model, positive, negative, cfg)


@node("RandomNoise", category="sampling/custom_sampling/noise")
def random_noise(noise_seed: Annotated[int, SEED] = 0) -> Noise:
    """Random noise from a seed."""
    return NoiseHandle(noise_seed)


@node("DisableNoise", category="sampling/custom_sampling/noise")
def disable_noise() -> Noise:
    """No noise: the latent has its own already."""
    return NoiseHandle(0, initial=False)


@node(
    "SamplerCustomAdvanced",
    category="sampling/custom_sampling",
    output_names=("output", "denoised_output"),
)
def sampler_custom_advanced(
    noise: Noise,
    guider: Guider,
    sampler: Sampler,
    sigmas: Sigmas,
    latent_image: Latent,
    *,
    context: NodeContext,
) -> tuple[Latent, Latent]:
    """Denoises a latent: as it is at the last sigma, and as the model last estimated it without noise."""
    from usoflow.nodes.denoising import denoise_latent

    denoised = denoise_latent(guider, latent_image, noise, sampler, sigmas, context)
    return {**latent_image, "samples": denoised.samples}, {**latent_image, "samples": denoised.estimate}

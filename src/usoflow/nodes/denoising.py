"""Joins models and sampling: handle, conditioning and latent become velocities; a sampler follows them.

The order of one run: prepare (style tokens, references, text: once), schedule, noise, steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.flux import Flux, FluxConfig, FluxInputs
from usoflow.models.library import ModelLibrary
from usoflow.models.references import DEFAULT_METHOD
from usoflow.models.vae import LatentFormat
from usoflow.nodes.sockets import Conditioning, Model
from usoflow.sampling.denoise import StepReport, sample
from usoflow.sampling.guidance import Guidance
from usoflow.sampling.noise import initial_noise, step_noise
from usoflow.sampling.samplers import SAMPLERS
from usoflow.sampling.schedule import FluxSchedule, sigmas
from usoflow.sampling.step_cache import StepCache, Velocity

logger = logging.getLogger(__name__)

DEFAULT_GUIDANCE = 3.5  # where a conditioning sets none


@dataclass(frozen=True, slots=True)
class Run:
    """The widgets of a sampler node. `denoise` is the part of the schedule that is run, from its end."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float


def denoise_latent(
    model: Model,
    samples: Tensor,
    positive: Conditioning,
    negative: Conditioning,
    run: Run,
    *,
    library: ModelLibrary,
    report: Callable[[int, int], None],
) -> Tensor:
    """Denoise a latent.

    Args:
        model: transformer and adapters.
        samples: [B, C, H, W] unscaled; all zeros is an empty latent, of any number of channels.
        positive: what is wanted.
        negative: what is not; not evaluated where `run.cfg` is 1.
        run: the sampler's settings.
        library: where the models come from.
        report: is told (step, steps); what it raises ends the run.

    Returns:
        float32 [B, 16, H, W], unscaled, on the CPU.

    Raises:
        UsoflowError: `latent_channels`, `models_mismatch`, `batch_mismatch`, `non_finite`, and what loading
            models raises.
    """
    flux = library.flux(model.flux, model.loras, model.weight_dtype)
    samples = _with_channels(samples, flux.config.channels)
    schedule = FluxSchedule(model.flux.setting("sampling_shift", FluxSchedule().shift))
    levels = sigmas(run.scheduler, run.steps, run.denoise, schedule=schedule, sampler_name=run.sampler_name)
    if len(levels) < 2:
        return samples
    device, format_ = library.placement.device, LatentFormat()
    style = _style_tokens(model, library)
    positive_velocity = _velocity(flux, samples, positive, style, library)
    negative_velocity = None
    if not math.isclose(run.cfg, 1.0):  # at 1 it would cancel out: not even prepared
        negative_velocity = _velocity(flux, samples, negative, style, library)
    step_cache = StepCache(model.easy_cache, schedule) if model.easy_cache else None
    latent = format_.to_model(samples) if bool(samples.any()) else samples

    def watch(step: StepReport) -> None:
        report(step.index + 1, step.total)

    denoised = sample(
        Guidance(positive_velocity, negative_velocity, run.cfg, step_cache),
        SAMPLERS[run.sampler_name],
        levels,
        noise=initial_noise(samples.shape, run.seed).to(device),
        latent=latent.to(device),
        step_noise=step_noise(run.seed),
        watch=watch,
    )
    if step_cache is not None:
        _log_skips(step_cache)
    return format_.from_model(denoised).float().cpu()


def _with_channels(samples: Tensor, channels: int) -> Tensor:
    """An empty latent gets the model's channels (EmptyLatentImage makes 4 for any model)."""
    if samples.shape[1] == channels:
        return samples.float()
    if bool(samples.any()):
        raise UsoflowError(
            "latent_channels", f"The latent has {samples.shape[1]} channels, the model takes {channels}."
        )
    return samples.new_zeros(samples.shape[0], channels, *samples.shape[2:], dtype=torch.float32)


def _style_tokens(model: Model, library: ModelLibrary) -> Tensor | None:
    """Style tokens of every reference in the chain: [B, S, hidden], or None without styles.

    Their order does not matter but for rounding: they all have the position of the text.
    """
    if not model.styles:
        return None
    tokens = []
    for style in model.styles:
        tokens.append(library.style_tokens(style.projector, style.vision.hidden))
    batch = max(len(part) for part in tokens)
    _check_batch(tokens, batch, "style pictures")
    return torch.cat([part.expand(batch, -1, -1) for part in tokens], dim=1)


def _velocity(
    flux: Flux, samples: Tensor, conditioning: Conditioning, style: Tensor | None, library: ModelLibrary
) -> Velocity:
    """The velocity that a conditioning gives: the mean over its entries, prepared once."""
    prepared = [_prepare(flux, samples, entry, style, library) for entry in conditioning]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.stack([flux(x, sigma, inputs) for inputs in prepared]).mean(0)

    return velocity


def _prepare(
    flux: Flux,
    samples: Tensor,
    entry: tuple[Tensor, dict[str, Any]],
    style: Tensor | None,
    library: ModelLibrary,
) -> FluxInputs:
    text, options = entry
    device, batch = library.placement.device, len(samples)
    pooled = options.get("pooled_output")
    pooled = torch.zeros(1, flux.config.pooled_dim) if pooled is None else pooled
    references = [
        _with_channels(latent, flux.config.channels) for latent in options.get("reference_latents", [])
    ]
    _check_widths(flux.config, text, pooled, style)
    _check_batch(references, batch, "reference latents")
    _check_batch([text, pooled, *([] if style is None else [style])], batch, "prompts or style pictures")
    return flux.prepare(
        text.to(device),
        pooled.to(device),
        (samples.shape[-2], samples.shape[-1]),
        batch=batch,
        guidance=options.get("guidance", DEFAULT_GUIDANCE),
        references=[LatentFormat().to_model(latent).to(device) for latent in references],
        method=options.get("reference_latents_method", DEFAULT_METHOD),
        style=style,
        dtype=library.placement.dtype,
    )


def _check_widths(config: FluxConfig, text: Tensor, pooled: Tensor, style: Tensor | None) -> None:
    """Any files can be chosen together: each must give what this transformer takes."""
    for name, tensor, width in (
        ("T5", text, config.text_dim),
        ("CLIP-L", pooled, config.pooled_dim),
        ("style projector", style, config.hidden),
    ):
        if tensor is not None and tensor.shape[-1] != width:
            raise UsoflowError(
                "models_mismatch",
                f"The {name} gives vectors of {tensor.shape[-1]} numbers, the transformer takes {width}.",
            )


def _check_batch(tensors: Sequence[Tensor], batch: int, what: str) -> None:
    sizes = sorted({len(tensor) for tensor in tensors} - {1, batch})
    if sizes:
        raise UsoflowError(
            "batch_mismatch", f"{what} come in a batch of {sizes[0]}, the latent in one of {batch}."
        )


def _log_skips(step_cache: StepCache) -> None:
    report = step_cache.report
    logger.info("EasyCache skipped %d of %d steps.", report.skipped, len(report.decisions))
    if step_cache.settings.verbose:
        for decision in report.decisions:
            logger.info("EasyCache: %s", decision)

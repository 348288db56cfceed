"""Joins models and sampling: handle, conditioning and latent become velocities; a sampler follows them.

The order of one run: prepare (style tokens, references, text: once), schedule, noise, steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.flux import Flux, FluxInputs
from usoflow.models.flux_config import FluxConfig
from usoflow.models.latent_format import LatentFormat
from usoflow.models.library import ModelLibrary
from usoflow.models.references import DEFAULT_METHOD
from usoflow.nodes.context import NodeContext
from usoflow.nodes.handles import NoiseHandle
from usoflow.nodes.image import in_turn
from usoflow.nodes.sockets import Conditioning, Guider, Latent, Model
from usoflow.sampling.denoise import StepReport, sample
from usoflow.sampling.guidance import Guidance
from usoflow.sampling.noise import initial_noise, step_noise
from usoflow.sampling.samplers import SAMPLERS
from usoflow.sampling.schedule import FluxSchedule
from usoflow.sampling.step_cache import StepCache, Velocity

logger = logging.getLogger(__name__)

DEFAULT_GUIDANCE = 3.5  # where a conditioning sets none


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a run gives: float32 [B, 16, H, W], unscaled, on the CPU.

    Attributes:
        samples: the latent at the last sigma.
        estimate: the last estimate of the noiseless latent; the same where the last sigma is 0.
    """

    samples: Tensor
    estimate: Tensor


def schedule_of(model: Model) -> FluxSchedule:
    """The noise schedule: as set on the handle, else as its file declares, else FLUX.1's.

    FLUX.1 [schnell], which has no guidance, has none: `cli.py` of github.com/black-forest-labs/flux.
    """
    if model.shift is not None:
        return FluxSchedule(model.shift)
    guided = FluxConfig.from_component(model.flux).guidance
    return FluxSchedule(model.flux.setting("sampling_shift", FluxSchedule().shift if guided else 0.0))


def denoise_latent(
    guider: Guider,
    latent: Latent,
    noise: NoiseHandle,
    sampler_name: str,
    sigmas: Tensor,
    context: NodeContext,
) -> Denoised:
    """Denoise a latent.

    Args:
        guider: model and conditioning.
        latent: `samples` [B, C, H, W] unscaled (all zeros is an empty latent, of any number of channels);
            `noise_mask` limits what is made anew, `batch_index` tells which noise each gets.
        noise: what is drawn; of the step noise too.
        sampler_name: a key of `SAMPLERS`.
        sigmas: float32 [steps + 1]; with fewer than 2 the latent is given back.
        context: its library has the models; its `report` is told each step, and what it raises ends the run.

    Raises:
        UsoflowError: `latent_channels`, `batch_mismatch`, `non_finite`, and what loading models raises.
    """
    model, library = guider.model, context.library
    samples = _with_channels(latent["samples"], FluxConfig.from_component(model.flux).channels)
    if len(sigmas) < 2:
        return Denoised(samples, samples)
    style = _style_tokens(model, len(samples), library)  # first: where memory is short, they need it alone
    flux = library.flux(model.flux, model.loras, model.weight_dtype)
    device, format_ = library.placement.device, LatentFormat.from_component(model.flux)
    schedule = schedule_of(model)
    step_cache = StepCache(model.easy_cache, schedule) if model.easy_cache else None
    guidance = _guidance(flux, samples, guider, style, step_cache, library)
    library.check()
    start = format_.to_model(samples) if bool(samples.any()) else samples
    estimate = start

    def watch(step: StepReport) -> None:
        nonlocal estimate
        estimate = step.denoised
        context.report(step.index + 1, step.total, format_.from_model(step.denoised))

    denoised = sample(
        guidance,
        SAMPLERS[sampler_name],
        sigmas,
        noise=_drawn(noise, samples, latent.get("batch_index")).to(device),
        latent=start.to(device),
        step_noise=step_noise(noise.seed),
        watch=watch,
        mask=_mask(latent.get("noise_mask"), samples, device),
    )
    if step_cache is not None:
        _log_skips(step_cache)
    return Denoised(*(format_.from_model(x).float().cpu() for x in (denoised, estimate)))


def _drawn(noise: NoiseHandle, samples: Tensor, places: Sequence[int] | None) -> Tensor:
    if not noise.initial:
        return torch.zeros_like(samples)
    return initial_noise(samples.shape, noise.seed, batch_index=places)


def _mask(mask: Tensor | None, samples: Tensor, device: torch.device) -> Tensor | None:
    """[N, H, W] in pixels, or [N, 1, H, W] as custom nodes have it, to [B or 1, 1, h, w] in latents.

    Several are for the latents in turn.
    """
    if mask is None:
        return None
    planes, batch = mask.reshape(-1, 1, *mask.shape[-2:]), len(samples)
    if len(planes) > 1:
        planes = in_turn(planes, batch)
    scaled = F.interpolate(planes.float(), size=samples.shape[-2:], mode="bilinear")
    return scaled.to(device)


def _guidance(
    flux: Flux,
    samples: Tensor,
    guider: Guider,
    style: Tensor | None,
    step_cache: StepCache | None,
    library: ModelLibrary,
) -> Guidance:
    """The denoiser of a run; what a cfg of 1 would cancel out is not even prepared."""

    def velocity(conditioning: Conditioning) -> Velocity:
        return _velocity(flux, samples, conditioning, style, guider.model, library)

    needed = guider.negative is not None and not math.isclose(guider.cfg, 1.0)
    negative = velocity(guider.negative) if needed and guider.negative else None
    return Guidance(velocity(guider.positive), negative, guider.cfg, step_cache)


def _with_channels(samples: Tensor, channels: int) -> Tensor:
    """An empty latent gets the model's channels (EmptyLatentImage makes 4 for any model)."""
    if samples.shape[1] == channels:
        return samples.float()
    if bool(samples.any()):
        raise UsoflowError(
            "latent_channels", f"The latent has {samples.shape[1]} channels, the model takes {channels}."
        )
    return samples.new_zeros(samples.shape[0], channels, *samples.shape[2:], dtype=torch.float32)


def _style_tokens(model: Model, batch: int, library: ModelLibrary) -> Tensor | None:
    """Style tokens of every reference in the chain: [B or 1, S, hidden], or None without styles.

    Their order does not matter but for rounding: they all have the position of the text.
    """
    if not model.styles:
        return None
    # Of an animated picture, the first frames count.
    tokens = [library.style_tokens(style.projector, style.vision.hidden)[:batch] for style in model.styles]
    width = FluxConfig.from_component(model.flux).hidden
    for part in tokens:
        _check_width("style projector", part, width)
    _check_batch(tokens, batch, "style pictures")
    longest = max(len(part) for part in tokens)
    return torch.cat([part.expand(longest, -1, -1) for part in tokens], dim=1)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One entry of a conditioning, ready for the transformer, and from which to which sigma it counts."""

    inputs: FluxInputs
    first: float
    last: float

    @property
    def always(self) -> bool:
        return self.first >= 1.0 and self.last <= 0.0

    def counts(self, sigma: float) -> bool:
        return self.last <= sigma <= self.first


def _velocity(
    flux: Flux,
    samples: Tensor,
    conditioning: Conditioning,
    style: Tensor | None,
    model: Model,
    library: ModelLibrary,
) -> Velocity:
    """The velocity that a conditioning gives: the mean over the entries that count at this sigma.

    Where none does, nothing is asked for: the estimate is then the zero latent.
    """
    schedule = schedule_of(model)
    asked = [
        _Asked(_prepare(flux, samples, entry, style, model, library), *_sigma_range(entry[1], schedule))
        for entry in conditioning
    ]
    always = all(item.always for item in asked)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        # Looking at sigma waits for the device, so it is done only where it decides something.
        now = asked if always else [item for item in asked if item.counts(float(sigma))]
        if not now:
            return x / sigma
        return torch.stack([flux(x, sigma, item.inputs) for item in now]).mean(0)

    return velocity


def _sigma_range(options: dict[str, Any], schedule: FluxSchedule) -> tuple[float, float]:
    """First and last sigma of an entry, rounded to float32 as those of the schedule are."""
    percents = (options.get("start_percent", 0.0), options.get("end_percent", 1.0))
    exact = [schedule.percent_to_sigma(p) for p in percents]
    first, last = torch.tensor(exact, device="cpu", dtype=torch.float32).tolist()
    return first, last


def _prepare(
    flux: Flux,
    samples: Tensor,
    entry: tuple[Tensor, dict[str, Any]],
    style: Tensor | None,
    model: Model,
    library: ModelLibrary,
) -> FluxInputs:
    text, options = entry
    to_model = LatentFormat.from_component(model.flux).to_model
    device, batch = library.placement.device, len(samples)
    pooled = options.get("pooled_output")
    pooled = text.new_zeros(1, flux.config.pooled_dim) if pooled is None else pooled
    given = options.get("reference_latents", [])  # of an animated picture, the first frames count
    references = [_with_channels(latent[:batch], flux.config.channels) for latent in given]
    _check_width("T5", text, flux.config.text_dim)
    _check_width("CLIP-L", pooled, flux.config.pooled_dim)
    _check_batch(references, batch, "reference latents")
    _check_batch([text, pooled], batch, "prompts")
    return flux.prepare(
        text.to(device),
        pooled.to(device),
        (samples.shape[-2], samples.shape[-1]),
        batch=batch,
        guidance=options.get("guidance", DEFAULT_GUIDANCE),
        references=[to_model(latent).to(device) for latent in references],
        method=options.get("reference_latents_method", DEFAULT_METHOD),
        style=style,
        dtype=library.placement.dtype,
    )


def _check_width(name: str, given: Tensor, width: int) -> None:
    """Any files can be chosen together: each must give what this transformer takes."""
    if given.shape[-1] != width:
        raise UsoflowError(
            "models_mismatch",
            f"The {name} gives vectors of {given.shape[-1]} numbers, the transformer takes {width}.",
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

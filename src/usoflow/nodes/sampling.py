"""Samplers: from noise, or from a latent, to a denoised latent."""

from __future__ import annotations

from typing import Annotated

from usoflow.nodes.context import NodeContext
from usoflow.nodes.handles import GuiderHandle, NoiseHandle
from usoflow.nodes.sockets import Conditioning, Latent, Model
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, Int, Tip

# Names and order as the editor shows them; the algorithms are in `sampling.samplers` and
# `sampling.schedule` (a test compares the names, which cannot be imported here without torch).
SAMPLER_NAMES = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "lcm", "res_multistep", "ddim")
SCHEDULER_NAMES = (
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
    "kl_optimal",
)  # fmt: skip

SEED = Int(min=0, max=2**64 - 1, control_after_generate=True)


@node("KSampler", category="sampling", display_name="KSampler")
def k_sampler(
    model: Model,
    seed: Annotated[int, SEED, Tip("Same seed, same noise.")] = 0,
    steps: Annotated[
        int, Int(min=1, max=10000), Tip("Number of denoising steps: more are slower and finer.")
    ] = 20,
    cfg: Annotated[
        float,
        Float(min=0.0, max=100.0, step=0.1, round=0.01),
        Tip("Strength of the negative prompt; at 1, as FLUX is made for, there is none."),
    ] = 8.0,
    *,
    sampler_name: Annotated[str, Choice(SAMPLER_NAMES), Tip("The sampling algorithm.")],
    scheduler: Annotated[str, Choice(SCHEDULER_NAMES), Tip("How noise decreases from step to step.")],
    positive: Annotated[Conditioning, Tip("What the picture is to show.")],
    negative: Annotated[Conditioning, Tip("What it is not to show.")],
    latent_image: Annotated[Latent, Tip("Where to begin: empty, or a picture to change.")],
    denoise: Annotated[
        float,
        Float(min=0.0, max=1.0, step=0.01),
        Tip("1 starts from pure noise; less keeps more of the latent."),
    ] = 1.0,
    context: NodeContext,
) -> Latent:
    """Denoises a latent."""
    from usoflow.nodes.denoising import denoise_latent, schedule_of
    from usoflow.sampling import schedule

    sigmas = schedule.sigmas(scheduler, steps, denoise, schedule=schedule_of(model))
    guider, noise = GuiderHandle(model, positive, negative, cfg), NoiseHandle(seed)
    denoised = denoise_latent(guider, latent_image, noise, sampler_name, sigmas, context)
    return {**latent_image, "samples": denoised.samples}


@node("KSamplerAdvanced", category="sampling", display_name="KSampler (Advanced)")
def k_sampler_advanced(
    model: Model,
    add_noise: Annotated[str, Choice(("enable", "disable"))],
    noise_seed: Annotated[int, SEED] = 0,
    steps: Annotated[int, Int(min=1, max=10000), Tip("Of the whole run, of which this may be a part.")] = 20,
    cfg: Annotated[float, Float(min=0.0, max=100.0, step=0.1, round=0.01)] = 8.0,
    *,
    sampler_name: Annotated[str, Choice(SAMPLER_NAMES)],
    scheduler: Annotated[str, Choice(SCHEDULER_NAMES)],
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    start_at_step: Annotated[int, Int(min=0, max=10000)] = 0,
    end_at_step: Annotated[int, Int(min=0, max=10000)] = 10000,
    return_with_leftover_noise: Annotated[str, Choice(("disable", "enable"))],
    context: NodeContext,
) -> Latent:
    """Denoises a latent over some of the steps of a run; what noise is left may go on to the next sampler."""
    from usoflow.nodes.denoising import denoise_latent, schedule_of
    from usoflow.sampling import schedule

    leftover = return_with_leftover_noise == "enable"
    sigmas = schedule.sigmas(scheduler, steps, 1.0, schedule=schedule_of(model))
    sigmas = schedule.window(sigmas, start_at_step, end_at_step, leftover=leftover)
    noise = NoiseHandle(noise_seed, initial=add_noise == "enable")
    guider = GuiderHandle(model, positive, negative, cfg)
    denoised = denoise_latent(guider, latent_image, noise, sampler_name, sigmas, context)
    return {**latent_image, "samples": denoised.samples}

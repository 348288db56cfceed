"""Pictures from captions with the modules under training: sample sheets and evaluation.

The same schedule, sampler and guidance as a workflow's (20 steps, euler, simple), batched over captions.
Called by `stages` while training runs, and by `evaluate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from usoflow.models.latent_format import LatentFormat
from usoflow.models.vae import AutoEncoder
from usoflow.sampling.schedule import FluxSchedule, sigmas
from usoflow.training.autoencoder import decode
from usoflow.training.base import GUIDANCE, Pocket

STEPS = 20
PROMPTS: Sequence[str] = (
    "a cat face on a beach, twemoji style",
    "a rocket in the night sky, flat style",
    "a pizza on a wooden floor",
    "an octopus under water, emojione style",
    "a sunflower in a meadow, glossy 3D style",
    "a penguin in the snow, flat style",
    "a house in a forest, twemoji style",
    "a red apple on a white background, emojione style",
    "a cactus in a desert, flat style",
    "an owl in the night sky, blob style",
    "a mushroom in front of a brick wall, twemoji style",
    "a dog face on a yellow background, black ink style",
    "a hamburger on a light blue background, pixel art",
    "a frog under water, watercolour",
    "an airplane at sunset, blueprint",
    "a ghost in a city at night, twemoji style",
)


def levels_of(steps: int) -> Tensor:
    """The noise levels of a workflow's run, descending to 0."""
    return sigmas("simple", steps, 1.0, schedule=FluxSchedule())


def euler(x: Tensor, levels: Tensor, velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Euler's method from the first level to the last; `velocity` is asked for x and sigma [B]."""
    for level, following in itertools.pairwise(levels):
        x = x + (following - level) * velocity(x, level.expand(len(x)))
    return x


@torch.no_grad()
def sample(
    pocket: Pocket,
    vae: AutoEncoder,
    prompts: Sequence[str],
    *,
    dtype: torch.dtype,
    side: int,
    seed: int = 0,
    cfg: float = 1.0,
    steps: int = STEPS,
) -> Tensor:
    """One picture per prompt, [N, side, side, 3] in 0..1.

    With `cfg` other than 1, the empty caption is the negative: how the base looks before distillation.
    """
    edge = side // 8
    x = torch.randn(len(prompts), 16, edge, edge, generator=torch.Generator().manual_seed(seed))
    text, blank = pocket.encode_texts(list(prompts)), pocket.encode_texts([""])

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v = pocket.velocity(x, sigma, text, guidance=GUIDANCE, dtype=dtype).float()
        if cfg == 1.0:
            return v
        u = pocket.velocity(x, sigma, blank, guidance=GUIDANCE, dtype=dtype).float()
        return u + cfg * (v - u)

    x = euler(x, levels_of(steps), velocity)
    return decode(vae, LatentFormat().from_model(x))

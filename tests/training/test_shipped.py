"""The shipped checkpoint is read by the ordinary loaders and draws what a prompt says, as far as it can."""

from __future__ import annotations

import itertools

import pytest
import torch

from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.latent_format import LatentFormat
from usoflow.models.loading import load_clip, load_flux, load_t5, load_vae
from usoflow.models.text import encode_prompt
from usoflow.models.tokens import ClipTokenizer, T5Tokenizer, Tokenizers
from usoflow.sampling.schedule import FluxSchedule, sigmas
from usoflow.settings import POCKET_MODELS

PATH = POCKET_MODELS / "checkpoints" / "usoflow-pocket.safetensors"
FAMILY_BYTES = 32_000_000  # with LoRA, projector and vision tower


@pytest.fixture(scope="module")
def parts() -> dict[str, Component]:
    return dict(TensorFile.open(PATH).components())


def picture(parts: dict[str, Component], prompt: str) -> torch.Tensor:
    """A picture of the trained size in 8 steps of euler at cfg 1.7, [128, 128, 3]."""
    clip, t5, flux = load_clip(parts["clip_l"]), load_t5(parts["t5"]), load_flux(parts["flux"])
    tokenizers = Tokenizers(ClipTokenizer(clip.config.positions), T5Tokenizer(t5.config.min_length))
    told, blank = (
        flux.prepare(text.context, text.pooled, (16, 16))
        for text in (encode_prompt(words, clip, t5, tokenizers) for words in (prompt, ""))
    )
    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    levels = sigmas("simple", 8, 1.0, schedule=FluxSchedule())
    with torch.no_grad():
        for level, following in itertools.pairwise(levels):
            against = flux(x, level, blank)
            x = x + (following - level) * (against + 1.7 * (flux(x, level, told) - against))
    return load_vae(parts["vae"]).decode(LatentFormat().from_model(x))[0]


def test_size_and_contents(parts: dict[str, Component]) -> None:
    assert set(parts) == {"flux", "clip_l", "t5", "vae"}
    assert PATH.stat().st_size < FAMILY_BYTES


def test_background_and_subject_follow_the_prompt(parts: dict[str, Component]) -> None:
    apple = picture(parts, "a red apple on a white background, flat style")
    cactus = picture(parts, "a cactus on a black background, flat style")
    corners = [torch.cat([p[:12, :12], p[:12, -12:]]).mean(dim=(0, 1)) for p in (apple, cactus)]
    assert corners[0].min() > 0.8
    assert corners[1].max() < 0.2
    red, green, blue = apple[48:80, 48:80].mean(dim=(0, 1))
    assert red > green + 0.3
    assert red > blue + 0.3
    red, green, blue = cactus[48:80, 48:80].mean(dim=(0, 1))
    assert green > red + 0.1
    assert green > blue + 0.1

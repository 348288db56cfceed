"""Latents: sizes, and to pictures and back."""

from __future__ import annotations

import pytest
import torch

from usoflow.errors import UsoflowError
from usoflow.nodes import latent, loaders
from usoflow.nodes.context import NodeContext

CHECKPOINT = "flux1-dev-fp8.safetensors"


def test_empty_latents() -> None:
    four = latent.empty_latent(512, 768, 2)["samples"]
    sixteen = latent.empty_sd3_latent(1024, 512, 3)["samples"]
    assert four.shape == (2, 4, 96, 64)
    assert sixteen.shape == (3, 16, 64, 128)
    assert four.dtype == sixteen.dtype == torch.float32
    assert not four.any()
    assert not sixteen.any()


def test_defaults_are_the_reference_s() -> None:
    assert latent.empty_latent()["samples"].shape == (1, 4, 64, 64)
    assert latent.empty_sd3_latent()["samples"].shape == (1, 16, 128, 128)


@torch.inference_mode()
def test_sides_are_cropped_about_the_middle(context: NodeContext) -> None:
    """Whatever lies outside the largest multiple of 8 does not count."""
    vae = loaders.load_checkpoint(CHECKPOINT, context=context)[2]
    images = torch.rand(1, 20, 37, 3, generator=torch.Generator().manual_seed(0))
    encoded = latent.vae_encode(images, vae, context=context)["samples"]
    assert encoded.shape == (1, 16, 2, 4)
    middle = images[:, 2:18, 2:34]
    assert torch.allclose(encoded, latent.vae_encode(middle, vae, context=context)["samples"], atol=1e-5)


@torch.inference_mode()
def test_pictures_of_a_batch_do_not_mix(context: NodeContext) -> None:
    vae = loaders.load_checkpoint(CHECKPOINT, context=context)[2]
    images = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    both = latent.vae_encode(images, vae, context=context)
    decoded = latent.vae_decode(both, vae, context=context)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    one = latent.vae_encode(images[1:], vae, context=context)
    assert torch.allclose(one["samples"], both["samples"][1:], atol=1e-5)
    assert torch.allclose(latent.vae_decode(one, vae, context=context), decoded[1:], atol=1e-5)


def test_transparency_of_a_picture_is_no_colour(context: NodeContext) -> None:
    vae = loaders.load_checkpoint(CHECKPOINT, context=context)[2]
    images = torch.rand(1, 16, 16, 4, generator=torch.Generator().manual_seed(0))
    four, three = (latent.vae_encode(i, vae, context=context)["samples"] for i in (images, images[..., :3]))
    assert torch.equal(four, three)


def test_channels_of_another_kind_of_model(context: NodeContext) -> None:
    vae = loaders.load_checkpoint(CHECKPOINT, context=context)[2]
    with pytest.raises(UsoflowError) as caught:
        latent.vae_decode(latent.empty_latent(64, 64), vae, context=context)
    assert caught.value.code == "latent_channels"

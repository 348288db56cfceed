"""Latents: empty ones, and to and from pictures through the VAE."""

from __future__ import annotations

from typing import Annotated

from usoflow.nodes.context import NodeContext
from usoflow.nodes.sockets import Image, Latent, Vae
from usoflow.schema.node import node
from usoflow.schema.specs import Int, Tip

_BATCH = Int(min=1, max=4096)
_DOWN = 8  # pixels per latent along one side


@node("EmptyLatentImage", category="latent", display_name="Empty Latent Image")
def empty_latent(
    width: Annotated[int, Int(min=16, max=16384, step=8), Tip("In pixels.")] = 512,
    height: Annotated[int, Int(min=16, max=16384, step=8), Tip("In pixels.")] = 512,
    batch_size: Annotated[int, _BATCH, Tip("How many pictures.")] = 1,
) -> Latent:
    """An empty latent; it gets the model's channels when it is sampled."""
    return _zeros(batch_size, 4, height, width)


@node("EmptySD3LatentImage", category="latent/sd3")
def empty_sd3_latent(
    width: Annotated[int, Int(min=16, max=16384, step=16)] = 1024,
    height: Annotated[int, Int(min=16, max=16384, step=16)] = 1024,
    batch_size: Annotated[int, _BATCH] = 1,
) -> Latent:
    """An empty latent of 16 channels, as SD3 and FLUX have them."""
    return _zeros(batch_size, 16, height, width)


@node("VAEEncode", category="latent", display_name="VAE Encode")
def vae_encode(pixels: Image, vae: Vae, *, context: NodeContext) -> Latent:
    """Encodes pictures; sides are cropped to multiples of 8."""
    return {"samples": context.library.vae_encode(vae.vae, pixels)}


@node("VAEDecode", category="latent", display_name="VAE Decode")
def vae_decode(samples: Latent, vae: Vae, *, context: NodeContext) -> Image:
    """Decodes latents to pictures."""
    return context.library.vae_decode(vae.vae, samples["samples"])


def _zeros(batch: int, channels: int, height: int, width: int) -> Latent:
    import torch

    return {"samples": torch.zeros(batch, channels, height // _DOWN, width // _DOWN)}

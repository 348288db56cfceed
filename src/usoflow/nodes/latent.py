"""Latents: empty ones, and to and from pictures through the VAE."""

from __future__ import annotations

from typing import Annotated

from usoflow.models.tiling import Grid
from usoflow.nodes.context import NodeContext
from usoflow.nodes.sockets import Image, Latent, Vae
from usoflow.schema.node import node
from usoflow.schema.specs import Int, Tip

_BATCH = Int(min=1, max=4096)
_DOWN = 8  # pixels per latent along one side
_OVERLAP = Int(min=0, max=4096, step=32)
_IN_PIXELS = Tip("In pixels.")
_FRAMES = Int(min=8, max=4096, step=4)
_FRAMES_OVERLAP = Int(min=4, max=4096, step=4)
_VIDEO_ONLY = Tip("For the VAEs of video models; a picture's ignores it.")


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


@node("VAEEncodeTiled", category="_for_testing", display_name="VAE Encode (Tiled)")
def vae_encode_tiled(
    pixels: Image,
    vae: Vae,
    tile_size: Annotated[int, Int(min=64, max=4096, step=64), _IN_PIXELS] = 512,
    overlap: Annotated[int, _OVERLAP, _IN_PIXELS] = 64,
    temporal_size: Annotated[int, _FRAMES, _VIDEO_ONLY] = 64,
    temporal_overlap: Annotated[int, _FRAMES_OVERLAP, _VIDEO_ONLY] = 8,
    *,
    context: NodeContext,
) -> Latent:
    """Encodes pictures in overlapping tiles, so that memory does not grow with their size."""
    from usoflow.models.vae import centre_crop

    grid = Grid(*_in_latents(tile_size, overlap), before=_DOWN, after=1)
    return {"samples": context.library.vae_encode_once(vae.vae, centre_crop(pixels, _DOWN), tiles=grid)}


@node("VAEDecodeTiled", category="_for_testing", display_name="VAE Decode (Tiled)")
def vae_decode_tiled(
    samples: Latent,
    vae: Vae,
    tile_size: Annotated[int, Int(min=64, max=4096, step=32), _IN_PIXELS] = 512,
    overlap: Annotated[int, _OVERLAP, _IN_PIXELS] = 64,
    temporal_size: Annotated[int, _FRAMES, _VIDEO_ONLY] = 64,
    temporal_overlap: Annotated[int, _FRAMES_OVERLAP, _VIDEO_ONLY] = 8,
    *,
    context: NodeContext,
) -> Image:
    """Decodes latents in overlapping tiles, so that memory does not grow with their size."""

    grid = Grid(*_in_latents(tile_size, overlap), before=1, after=_DOWN)
    return context.library.vae_decode(vae.vae, samples["samples"], tiles=grid)


def _in_latents(tile_size: int, overlap: int) -> tuple[int, int]:
    """From pixels; at most a quarter of a tile overlaps on each side."""
    return tile_size // _DOWN, min(overlap, tile_size // 4) // _DOWN


def _zeros(batch: int, channels: int, height: int, width: int) -> Latent:
    import torch

    shape = (batch, channels, height // _DOWN, width // _DOWN)
    return {"samples": torch.zeros(shape, device="cpu", dtype=torch.float32)}

"""Pictures of latents while they are sampled: 16 channels to red, green and blue by a linear map.

The map is fitted once per VAE, by least squares, on a picture that the VAE itself encodes: the average colour
of 8x8 pixels against the latent there. It costs one small matrix product a step, decoding a second.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.library import ModelLibrary
from usoflow.settings import Folders
from usoflow.workflow.prompt import PromptNode

SIDE = 256  # pixels of the picture that the map is fitted on: 1024 equations, 17 unknowns
LONGEST_SIDE = 512  # of a preview
PERIOD = 0.1  # seconds between previews
QUALITY = 80  # JPEG
_FOLDERS = {"VAELoader": ("vae", "vae_name"), "CheckpointLoaderSimple": ("checkpoints", "ckpt_name")}


@dataclass
class Previewer:
    """Makes previews with the VAE of the nodes that are run."""

    library: ModelLibrary
    _maps: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)
    _vae: Component | None = None
    _last: float = 0.0

    def choose(self, nodes: Sequence[PromptNode], folders: Folders) -> None:
        """Use the VAE that these nodes load, if they load one."""
        self._vae = vae_of(nodes, folders)

    def jpeg(self, latent: Tensor) -> bytes:
        """The first of a latent [B, 16, h, w], unscaled, as JPEG; empty if it is too soon."""
        if self._vae is None or time.monotonic() - self._last < PERIOD:
            return b""
        key = self._vae.file.fingerprint
        if key not in self._maps:
            self._maps[key] = _fit_or_none(self.library, self._vae)
        weights = self._maps[key]
        if weights is None or len(weights) != latent.shape[1] + 1:
            return b""
        picture = Image.fromarray(colours(latent[0], weights))
        scale = max(1, min(8, LONGEST_SIDE // max(picture.size)))
        buffer = io.BytesIO()
        size = (picture.width * scale, picture.height * scale)
        picture.resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=QUALITY)
        self._last = time.monotonic()
        return buffer.getvalue()


def vae_of(nodes: Sequence[PromptNode], folders: Folders) -> Component | None:
    """The VAE that is loaded by itself, else that of the checkpoint; None if there is none to be had."""
    for class_type, (folder, name) in _FOLDERS.items():
        for node in nodes:
            file = node.inputs.get(name) if node.class_type == class_type else None
            if isinstance(file, str) and (found := _component(folders, folder, file)):
                return found
    return None


def _component(folders: Folders, folder: str, name: str) -> Component | None:
    try:
        return TensorFile.open(folders.model(folder, name)).components().get("vae")
    except UsoflowError:  # the loader node will say so
        return None


def _fit_or_none(library: ModelLibrary, vae: Component) -> Tensor | None:
    try:
        return fit(library, vae)
    except (UsoflowError, RuntimeError, MemoryError) as error:  # torch's, of memory and of algebra, too
        if isinstance(error, UsoflowError) and error.code == "cancelled":
            raise
        # A run does not fail for want of a preview; the decoder will say what is wrong.
        return None


def fit(library: ModelLibrary, vae: Component) -> Tensor:
    """The map of a VAE: float32 [channels + 1, 3], the last row is the constant."""
    with torch.inference_mode():
        picture = _colourful(SIDE)  # [1, H, W, 3]
        # By the CPU: on a GPU the transformer is at work, and might have to make room.
        latent = library.vae_encode_once(vae, picture, on_cpu=True).float()[0]  # [C, h, w]
        side = SIDE // latent.shape[-1]
        wanted = torch.nn.functional.avg_pool2d(picture.permute(0, 3, 1, 2), side)[0]  # [3, h, w]
        known = _with_constant(latent)  # [h * w, C + 1]
        return torch.linalg.lstsq(known, wanted.flatten(1).T, driver="gelsd").solution


def colours(latent: Tensor, weights: Tensor) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """A latent [C, h, w] as uint8 [h, w, 3]."""
    rgb = _with_constant(latent.float().cpu()) @ weights  # [h * w, 3]
    return (rgb.clamp(0, 1) * 255).to(torch.uint8).reshape(*latent.shape[1:], 3).numpy()


def _with_constant(latent: Tensor) -> Tensor:
    flat = latent.flatten(1).T  # [h * w, C]
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)


def _colourful(side: int) -> Tensor:
    """Smooth patches of many colours: [1, side, side, 3] in 0..1."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, side // 16, side // 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return smooth.permute(0, 2, 3, 1).contiguous()

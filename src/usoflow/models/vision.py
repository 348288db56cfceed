"""The SigLIP vision tower: a style picture to hidden states at the depths that USO's projector reads.

Weights come from `sigclip_vision_patch14_384.safetensors`; called by the CLIPVisionEncode node. It computes
in fp32 whatever the file stores. SigLIP: Zhai et al. 2023 (arXiv 2303.15343), shape so400m: Alabdulmohsin et
al. 2023 (arXiv 2305.13035). Layer norms use 1e-5 as the reference does (the published configuration says
1e-6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component
from usoflow.models.encoder import EncoderLayer, LayerStack, head_count
from usoflow.models.finite import require_finite
from usoflow.models.weights import Conv2d, Embedding

HEADS: Mapping[int, int] = MappingProxyType({1152: 16})  # official, by width
EPS = 1e-5
OFFICIAL_GRID, OFFICIAL_PATCH, OFFICIAL_SIZE = 27, 14, 384  # 378 of 384 pixels are seen

LONGEST = 8  # sides of a picture's middle; what is farther away no filter reaches
# What comes after the last layer: USO reads the layers themselves.
IGNORED: tuple[str, ...] = ("post_layernorm.*", "head.*")


@dataclass(frozen=True, slots=True)
class SiglipConfig:
    """Sizes of a SigLIP vision tower.

    Attributes:
        dim, mlp_dim, layers, heads: of the transformer.
        patch: side of a patch in pixels.
        grid: patches along a side of the picture.
        image_size: side of the square picture that the tower is given; at least grid * patch pixels.
        eps: of the layer norms.
    """

    dim: int
    mlp_dim: int
    layers: int
    heads: int
    patch: int
    grid: int
    image_size: int
    eps: float = EPS

    @classmethod
    def from_component(cls, component: Component) -> Self:
        """Sizes from tensor shapes; `heads`, `image_size` and `eps` declared, else official.

        Raises:
            UsoflowError: `model_damaged`, `tensor_missing`, `tensor_shape`, `block_gap`, `model_unsupported`.
        """
        positions, dim = component.shape("embeddings.position_embedding.weight", 2)
        patch = component.shape("embeddings.patch_embedding.weight", 4)[-1]
        grid = math.isqrt(positions)
        official = OFFICIAL_SIZE if (grid, patch) == (OFFICIAL_GRID, OFFICIAL_PATCH) else grid * patch
        image_size = component.setting("image_size", official)
        if (image_size // patch) ** 2 != positions:
            raise UsoflowError(
                "model_unsupported",
                f"{component.file.path.name}: pictures of {image_size} pixels in patches of {patch} do not "
                f"give the {positions} positions of this vision tower.",
                remedy="USO sees style pictures with sigclip_vision_patch14_384.safetensors.",
            )
        return cls(
            dim=dim,
            mlp_dim=component.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
            layers=component.count("encoder.layers.{}."),
            heads=head_count(component, dim, HEADS),
            patch=patch,
            grid=grid,
            image_size=image_size,
            eps=component.setting("eps", EPS),
        )


@dataclass(frozen=True, slots=True, eq=False)
class VisionOutput:
    """What the tower made of a batch of pictures.

    Attributes:
        hidden: float32 [B, patches, dim] by layer, counted from the end as -1, -2, ...; no norm applied.
    """

    hidden: Mapping[int, Tensor]


class SiglipVision(nn.Module):
    """Patches to hidden states."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = LayerStack(
            EncoderLayer(config.dim, config.heads, config.mlp_dim, config.eps, gelu)
            for _ in range(config.layers)
        )

    def forward(self, pixels: Tensor, layers: Sequence[int]) -> VisionOutput:
        """Run as far as the deepest layer asked for.

        Args:
            pixels: [B, 3, image_size, image_size] from `preprocess`.
            layers: which layers' outputs to keep, counted from the end (-1 is the last).

        Raises:
            UsoflowError: `model_unsupported` if the tower has no such layer; `non_finite`.
        """
        wanted = {self._number(layer): layer for layer in layers}
        hidden: dict[int, Tensor] = {}
        x = self.embeddings(pixels.float())
        for number in range(max(wanted) + 1):
            x = self.encoder.layers[number](x)
            if number in wanted:
                hidden[wanted[number]] = require_finite(x, "The SigLIP vision tower")
        return VisionOutput(MappingProxyType(hidden))

    def _number(self, layer: int) -> int:
        depth = self.config.layers
        if not -depth <= layer < 0:
            raise UsoflowError("model_unsupported", f"Layer {layer} of a vision tower with {depth} layers.")
        return depth + layer


class _Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = Conv2d(3, config.dim, config.patch, stride=config.patch)
        self.position_embedding = Embedding(config.grid**2, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, grid * grid, dim]
        positions: Tensor = self.position_embedding(torch.arange(patches.shape[1], device=pixels.device))
        return patches + positions


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def preprocess(images: Tensor, size: int, crop: str = "center") -> Tensor:
    """Pictures as the tower wants them, rounded to 8 bits on the way as the reference does.

    Args:
        images: [B, H, W, C] in 0..1; channels beyond the third are dropped.
        size: side of the result in pixels.
        crop: "center" scales the shorter side to `size` and cuts the middle; "none" stretches.

    Returns:
        float32 [B, 3, size, size] in -1..1.
    """
    x = images[..., :3].movedim(-1, 1).float()
    if crop == "center":  # of a very long picture the ends would be scaled, only to be cut off
        longest = LONGEST * min(x.shape[2:])
        longest += (max(x.shape[2:]) - longest) % 2  # as much on either side
        (top, left) = (max(0, side - longest) // 2 for side in x.shape[2:])
        x = x[..., top : top + longest, left : left + longest]
    height, width = x.shape[2:]
    if (height, width) != (size, size):
        x = F.interpolate(x, _scaled(height, width, size, crop), mode="bicubic", antialias=True)
        top, left = ((side - size) // 2 for side in x.shape[2:])
        x = x[..., top : top + size, left : left + size]
    return ((255 * x).clamp(0, 255).round() / 255 - 0.5) / 0.5


def _scaled(height: int, width: int, size: int, crop: str) -> tuple[int, int]:
    if crop == "none":
        return size, size
    scale = size / min(height, width)
    return round(scale * height), round(scale * width)

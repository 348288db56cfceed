"""The USO style projector: hidden states of SigLIP at three depths to style tokens of the transformer.

Architecture: bytedance/USO, uso/flux/model.py, `SigLIPMultiFeatProjModel` (Apache-2.0); method: arXiv
2508.18966, section 3.2. It always computes in fp32, whatever the file stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component
from usoflow.models.weights import LayerNorm, Linear

# Which hidden state of the vision tower feeds each level, counted from the last layer.
LEVELS: Mapping[str, int] = MappingProxyType({"high": -2, "mid": -11, "low": -20})
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class StyleProjectorConfig:
    """patches: tokens of the vision tower; style_tokens: per level; widths of tower and transformer."""

    patches: int
    style_tokens: int
    vision_dim: int
    hidden: int

    @classmethod
    def from_component(cls, component: Component) -> Self:
        """Everything from tensor shapes.

        Raises:
            UsoflowError: `tensor_missing`, `tensor_shape`.
        """
        style_tokens, patches = component.shape("feature_embedder.low_embedding_linear.0.weight", 2)
        hidden, vision_dim = component.shape("feature_embedder.low_projection.weight", 2)
        return cls(patches, style_tokens, vision_dim, hidden)


class StyleProjector(nn.Module):
    """Three independent levels; their tokens follow each other from high to low."""

    def __init__(self, config: StyleProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_embedder = nn.ModuleDict()
        for level in LEVELS:
            self.feature_embedder[f"{level}_embedding_linear"] = nn.ModuleList(
                [Linear(config.patches, config.style_tokens)]
            )
            self.feature_embedder[f"{level}_layer_norm"] = LayerNorm(config.vision_dim, NORM_EPS)
            self.feature_embedder[f"{level}_projection"] = Linear(config.vision_dim, config.hidden)

    def forward(self, states: Mapping[int, Tensor]) -> Tensor:
        """Style tokens.

        Args:
            states: hidden states [B, patches, vision_dim] by layer, with the layers of `LEVELS`.

        Returns:
            float32 [B, 3 * style_tokens, hidden].

        Raises:
            UsoflowError: `models_mismatch` if the states are those of another vision tower.
        """
        wanted = (self.config.patches, self.config.vision_dim)
        if found := {tuple(states[layer].shape[1:]) for layer in LEVELS.values()} - {wanted}:
            patches, width = min(found)
            raise UsoflowError(
                "models_mismatch",
                f"The vision tower gives {patches} tokens of width {width}, the style projector takes"
                f" {wanted[0]} of width {wanted[1]}.",
            )
        return torch.cat(
            [self._level(level, states[layer].float()) for level, layer in LEVELS.items()], dim=1
        )

    def _level(self, level: str, state: Tensor) -> Tensor:
        parts = self.feature_embedder
        pooled = F.silu(parts[f"{level}_embedding_linear"][0](state.transpose(1, 2)))  # type: ignore[index]
        normed = parts[f"{level}_layer_norm"](pooled.transpose(1, 2))  # [B, style_tokens, vision_dim]
        tokens: Tensor = parts[f"{level}_projection"](normed)
        return tokens

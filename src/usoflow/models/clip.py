"""CLIP-L's text encoder: tokens to one vector for a prompt, which modulates the whole picture.

Weights come from the `text_encoders.clip_l.` part of a checkpoint or from `clip_l.safetensors`; computes in
fp32, whatever dtype they are stored in. Radford et al. 2021 (arXiv 2103.00020); parameter names are those of
Hugging Face's published weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component
from usoflow.models.encoder import EncoderLayer, LayerStack, head_count, require_vocabulary
from usoflow.models.tokens import CLIP_VOCABULARY
from usoflow.models.weights import Embedding, LayerNorm

HEADS: Mapping[int, int] = MappingProxyType({768: 12})  # official, by width
EPS = 1e-5
LEAST_POSITIONS = 3  # a start, a token and an end
# FLUX.1 takes the pooled state without CLIP's projection; older files store the position numbers.
# Files of all of CLIP have its vision tower, too.
IGNORED: tuple[str, ...] = (
    "text_projection.weight",
    "text_model.embeddings.position_ids",
    "vision_model.*",
    "visual_projection.weight",
)


@dataclass(frozen=True, slots=True)
class ClipTextConfig:
    """Sizes of a CLIP text model; `positions` is the longest sequence."""

    dim: int
    mlp_dim: int
    layers: int
    positions: int
    heads: int
    eps: float = EPS
    vocabulary: int = CLIP_VOCABULARY

    @classmethod
    def from_component(cls, component: Component) -> Self:
        """Sizes from tensor shapes; `heads` and `eps` declared, else official.

        Raises:
            UsoflowError: `model_damaged`, `tensor_missing`, `tensor_shape`, `block_gap`, `model_unsupported`.
        """
        name = "text_model.embeddings.{}_embedding.weight"
        vocabulary, dim = component.shape(name.format("token"), 2)
        require_vocabulary(component, vocabulary, CLIP_VOCABULARY)
        positions = component.shape(name.format("position"), 2)[0]
        if positions < LEAST_POSITIONS:
            raise UsoflowError(
                "model_unsupported", f"{component.file.path.name} is a CLIP-L of {positions} positions."
            )
        return cls(
            dim=dim,
            mlp_dim=component.shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            layers=component.count("text_model.encoder.layers.{}."),
            positions=positions,
            heads=head_count(component, dim, HEADS),
            eps=component.setting("eps", EPS),
            vocabulary=vocabulary,
        )


class ClipText(nn.Module):
    """The text model of CLIP, without its projection."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = _ClipTransformer(config)

    def forward(self, ids: Tensor, end_positions: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            ids: int64 [B, T], T at most `config.positions`.
            end_positions: int64 [B], where the first end token of each row is.

        Returns:
            float32 [B, dim], the state at the end token after the final norm.
        """
        states: Tensor = self.text_model(ids)
        return states[torch.arange(len(ids), device=ids.device), end_positions]


class _ClipTransformer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = _ClipEmbeddings(config)
        self.encoder = LayerStack(
            EncoderLayer(config.dim, config.heads, config.mlp_dim, config.eps, quick_gelu)
            for _ in range(config.layers)
        )
        self.final_layer_norm = LayerNorm(config.dim, config.eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.encoder.layers:
            x = layer(x, causal=True)
        return self.final_layer_norm(x)


class _ClipEmbeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocabulary, config.dim)
        self.position_embedding = Embedding(config.positions, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(positions)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)

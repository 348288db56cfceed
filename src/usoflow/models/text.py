"""The text encoders of FLUX.1: a prompt to T5 states (what the transformer reads) and CLIP-L's pooled vector.

Weights come from the `text_encoders.` part of a checkpoint or from the split files `clip_l.safetensors` and
`t5xxl_*.safetensors`; token ids and weights from `tokens`. Both encoders compute in fp32, as the reference
does, whatever dtype their weights are stored in; T5's products may be narrower (`Placement.t5_dtype`).
In a T5 table that was rounded to fp8, values that fp8 does not have became NaN: they are read as 0, as the
reference does; other NaNs surface as the error `non_finite`.

CLIP-L: Radford et al. 2021 (arXiv 2103.00020). T5 v1.1: Raffel et al. 2020 (arXiv 1910.10683), Shazeer 2020
(arXiv 2002.05202) for the gated feed-forward. Parameter names are those of Hugging Face's published weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component
from usoflow.models.encoder import EncoderLayer, LayerStack, head_count, join_heads, split_heads
from usoflow.models.finite import require_finite
from usoflow.models.kinds import KIND_NAMES
from usoflow.models.tokens import (
    CLIP_END,
    CLIP_VOCABULARY,
    T5_END,
    T5_MIN_LENGTH,
    T5_PAD,
    T5_VOCABULARY,
    Tokenizers,
    TokenSequence,
)
from usoflow.models.weights import Embedding, LayerNorm, Linear, RMSNorm

logger = logging.getLogger(__name__)

CLIP_HEADS: Mapping[int, int] = MappingProxyType({768: 12})  # official, by width
CLIP_EPS = 1e-5
LEAST_POSITIONS = 3  # a start, a token and an end
# FLUX.1 takes the pooled state without CLIP's projection; older files store the position numbers.
# Files of all of CLIP have its vision tower, too.
CLIP_IGNORED: tuple[str, ...] = (
    "text_projection.weight",
    "text_model.embeddings.position_ids",
    "vision_model.*",
    "visual_projection.weight",
)

T5_EPS = 1e-6
T5_MAX_DISTANCE = 128  # tokens farther apart share the last bucket of the relative bias
T5_IGNORED: tuple[str, ...] = ("encoder.embed_tokens.weight",)  # the same table as `shared.weight`


@dataclass(frozen=True, slots=True, eq=False)
class TextEncoding:
    """An encoded prompt.

    Attributes:
        context: float32 [1, T, t5 width], T >= 256 with official weights; padding is part of it.
        pooled: float32 [1, clip width].
    """

    context: Tensor
    pooled: Tensor


def encode_prompt(
    text: str, clip: ClipText, t5: T5Encoder, tokenizers: Tokenizers, *, clip_text: str | None = None
) -> TextEncoding:
    """Encode a prompt with ComfyUI's weight syntax.

    Weights act on the T5 states: z' = (z - z_empty) * w + z_empty per token, where z_empty are the states of
    an empty prompt of the same length. They do not act on the pooled vector, which is that of the first 77
    CLIP tokens. CLIP gets `clip_text`, if that is given.

    Returns:
        The encoding, on the CPU.

    Raises:
        UsoflowError: `non_finite`.
    """
    context = _context(tokenizers.t5(text), t5)
    pooled = _pooled(tokenizers.clip(text if clip_text is None else clip_text)[0], clip)
    return TextEncoding(
        require_finite(context, "The T5 text encoder").cpu(),
        require_finite(pooled, "The CLIP-L text encoder").cpu(),
    )


def _context(sequence: TokenSequence, t5: T5Encoder) -> Tensor:
    device = t5.shared.weight.device
    ids = torch.tensor([sequence.ids], device=device)  # [1, T]
    if not sequence.weighted:
        return t5(ids)
    empty_ids = torch.full_like(ids, T5_PAD)
    empty_ids[:, 0] = T5_END
    states, empty = t5(torch.cat([ids, empty_ids])).chunk(2)  # [1, T, D] each
    weights = torch.tensor(sequence.weights, dtype=torch.float32, device=device)[:, None]  # [T, 1]
    return (states - empty) * weights + empty


def _pooled(sequence: TokenSequence, clip: ClipText) -> Tensor:
    end = sequence.ids.index(CLIP_END)
    device = clip.text_model.embeddings.token_embedding.weight.device
    ids = torch.tensor([sequence.ids[: end + 1]], device=device)  # no token sees what comes after it
    return clip(ids, torch.tensor([end], device=device))


# --- CLIP-L -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClipTextConfig:
    """Sizes of a CLIP text model; `positions` is the longest sequence."""

    dim: int
    mlp_dim: int
    layers: int
    positions: int
    heads: int
    eps: float = CLIP_EPS
    vocabulary: int = CLIP_VOCABULARY

    @classmethod
    def from_component(cls, component: Component) -> Self:
        """Sizes from tensor shapes; `heads` and `eps` declared, else official.

        Raises:
            UsoflowError: `model_damaged`, `tensor_missing`, `tensor_shape`, `block_gap`, `model_unsupported`.
        """
        name = "text_model.embeddings.{}_embedding.weight"
        vocabulary, dim = component.shape(name.format("token"), 2)
        _require_vocabulary(component, vocabulary, CLIP_VOCABULARY)
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
            heads=head_count(component, dim, CLIP_HEADS),
            eps=component.setting("eps", CLIP_EPS),
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


# --- T5 -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; all but `eps` and `min_length` follow from tensor shapes.

    Attributes:
        dim: width of the states.
        inner_dim: width of queries, keys and values of all heads together.
        mlp_dim: width of the feed-forward.
        layers: number of blocks.
        heads: attention heads.
        buckets: rows of the relative position bias.
        eps: of the norms.
        min_length: shorter prompts are padded to this many tokens.
        vocabulary: rows of the embedding table.
        table_in_fp8: whether the file stores that table so; where it overflowed there are NaNs in it.
    """

    dim: int
    inner_dim: int
    mlp_dim: int
    layers: int
    heads: int
    buckets: int = 32
    eps: float = T5_EPS
    min_length: int = T5_MIN_LENGTH
    vocabulary: int = 32128
    table_in_fp8: bool = False

    @classmethod
    def from_component(cls, component: Component) -> Self:
        """Sizes from tensor shapes; `eps` and `min_length` declared, else official.

        Raises:
            UsoflowError: `model_damaged`, `tensor_missing`, `tensor_shape`, `block_gap`, `model_unsupported`.
        """
        first = "encoder.block.0.layer."
        vocabulary, dim = component.shape("shared.weight", 2)
        _require_vocabulary(component, vocabulary, T5_VOCABULARY)
        buckets, heads = component.shape(first + "0.SelfAttention.relative_attention_bias.weight", 2)
        return cls(
            dim=dim,
            inner_dim=component.shape(first + "0.SelfAttention.q.weight", 2)[0],
            mlp_dim=component.shape(first + "1.DenseReluDense.wi_0.weight", 2)[0],
            layers=component.count("encoder.block.{}."),
            heads=heads,
            buckets=buckets,
            eps=component.setting("eps", T5_EPS),
            min_length=component.setting("min_length", T5_MIN_LENGTH),
            vocabulary=vocabulary,
            table_in_fp8=component.tensors["shared.weight"].dtype.startswith("F8"),
        )


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1. Every token attends to every token, padding included."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocabulary, config.dim)
        self.encoder = _T5Stack(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they are passed."""
        return list(self.encoder.block)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> float32 states [B, T, dim] after the final norm."""
        x = self.shared(ids)
        if self.config.table_in_fp8 and bool(x.isnan().any()):
            logger.warning("T5's table has NaNs for words of this prompt: they are read as 0.")
            x = x.nan_to_num(nan=0.0)
        return self.encoder(x)


class _T5Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(_T5Block(config, first=n == 0) for n in range(config.layers))
        self.final_layer_norm = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = None  # the first block's, which all share
        for block in self.block:
            x, bias = block(x, bias)
        return self.final_layer_norm(x)


class _T5Block(nn.Module):
    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_T5AttentionLayer(config, first=first), _T5FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        x, bias = self.layer[0](x, bias)
        return self.layer[1](x), bias


class _T5AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = _T5Attention(config, first=first)
        self.layer_norm = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = self.SelfAttention.position_bias(x.shape[1]) if bias is None else bias
        return x + self.SelfAttention(self.layer_norm(x), bias), bias


class _T5Attention(nn.Module):
    """Attention without scaling (it is in the weights) and with a learned bias by relative position."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v = (Linear(config.dim, config.inner_dim, bias=False) for _ in range(3))
        self.o = Linear(config.inner_dim, config.dim, bias=False)
        if first:
            self.relative_attention_bias = Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(part(x), self.heads) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(join_heads(attended))

    def position_bias(self, length: int) -> Tensor:
        """float32 [1, heads, T, T]: query i's bias towards key j."""
        table = self.relative_attention_bias
        positions = torch.arange(length, device=table.weight.device)
        buckets = relative_buckets(positions[None, :] - positions[:, None], table.weight.shape[0])
        return table(buckets).permute(2, 0, 1)[None]


class _T5FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = _GatedGelu(config)
        self.layer_norm = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _GatedGelu(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (Linear(config.dim, config.mlp_dim, bias=False) for _ in range(2))
        self.wo = Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def relative_buckets(distance: Tensor, buckets: int) -> Tensor:
    """Bucket of a relative position, key minus query (arXiv 1910.10683, section 2.1).

    Half of the buckets are for keys that come later. Of each half, the first half holds one distance each,
    the rest grows logarithmically up to `T5_MAX_DISTANCE`.

    Args:
        distance: int64 of any shape.
        buckets: rows of the bias table.

    Returns:
        int64 of the same shape, 0 to buckets - 1.
    """
    half = buckets // 2
    exact = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(T5_MAX_DISTANCE / exact)
    far = (exact + growth * (half - exact)).long().clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)


def _require_vocabulary(component: Component, rows: int, needed: int) -> None:
    if rows < needed:
        kind = KIND_NAMES[component.kind]
        raise UsoflowError(
            "model_unsupported",
            f"{component.file.path.name}: a {kind} with {rows} tokens instead of {needed}.",
        )

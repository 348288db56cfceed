"""T5's encoder: tokens to the states that the transformer reads.

Weights come from the `text_encoders.t5xxl.` part of a checkpoint or from `t5xxl_*.safetensors`. It computes
in fp32, as the reference does, whatever dtype they are stored in; products may be narrower
(`Placement.t5_dtype`). In a table that was rounded to fp8, values that fp8 does not have became NaN: they are
read as 0, as the reference does; other NaNs surface as the error `non_finite`.

T5 v1.1: Raffel et al. 2020 (arXiv 1910.10683), Shazeer 2020 (arXiv 2002.05202) for the gated feed-forward.
Parameter names are those of Hugging Face's published weights.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.models.checkpoint import Component
from usoflow.models.encoder import join_heads, require_vocabulary, split_heads
from usoflow.models.tokens import T5_MIN_LENGTH, T5_VOCABULARY
from usoflow.models.weights import Embedding, Linear, RMSNorm

logger = logging.getLogger(__name__)

EPS = 1e-6
MAX_DISTANCE = 128  # tokens farther apart share the last bucket of the relative bias
SCORES = 1 << 24  # of all heads at once: 64 MB; a prompt of 512 tokens has as many
IGNORED: tuple[str, ...] = ("encoder.embed_tokens.weight",)  # the same table as `shared.weight`


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
    eps: float = EPS
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
        require_vocabulary(component, vocabulary, T5_VOCABULARY)
        buckets, heads = component.shape(first + "0.SelfAttention.relative_attention_bias.weight", 2)
        return cls(
            dim=dim,
            inner_dim=component.shape(first + "0.SelfAttention.q.weight", 2)[0],
            mlp_dim=component.shape(first + "1.DenseReluDense.wi_0.weight", 2)[0],
            layers=component.count("encoder.block.{}."),
            heads=heads,
            buckets=buckets,
            eps=component.setting("eps", EPS),
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
        """Some queries at a time: of a prompt as long as a book, all scores would not fit into memory."""
        q, k, v = (split_heads(part(x), self.heads) for part in (self.q, self.k, self.v))
        length = x.shape[1]
        windows = bias.unfold(1, length, 1)  # [heads, T, T], a view: query i's is number T - 1 - i
        rows, attended = max(1, SCORES // (len(q) * self.heads * length)), torch.empty_like(q)
        for first in range(0, length, rows):
            last = min(first + rows, length)
            towards = windows[:, length - last : length - first].flip(1)[None]  # [1, heads, rows, T]
            attended[:, :, first:last] = F.scaled_dot_product_attention(
                q[:, :, first:last], k, v, attn_mask=towards, scale=1.0
            )
        return self.o(join_heads(attended))

    def position_bias(self, length: int) -> Tensor:
        """float32 [heads, 2 T - 1]: of a query towards keys from T - 1 places before it to T - 1 after."""
        table = self.relative_attention_bias
        distances = torch.arange(1 - length, length, device=table.weight.device)
        biases: Tensor = table(relative_buckets(distances, table.weight.shape[0]))
        return biases.T.contiguous()  # attention is slower at masks that lie otherwise


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
    the rest grows logarithmically up to `MAX_DISTANCE`.

    Args:
        distance: int64 of any shape.
        buckets: rows of the bias table.

    Returns:
        int64 of the same shape, 0 to buckets - 1.
    """
    half = buckets // 2
    exact = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + growth * (half - exact)).long().clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)

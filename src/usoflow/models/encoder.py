"""The pre-norm transformer layer that CLIP's text model and SigLIP's vision tower share.

Used by `clip` and `vision`; `t5` splits its heads and checks its vocabulary by it. Architecture: Radford et
al. 2021 (arXiv 2103.00020) and Zhai et al. 2023 (arXiv 2303.15343); the parameter names are those of Hugging
Face's published weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component
from usoflow.models.kinds import KIND_NAMES
from usoflow.models.weights import LayerNorm, Linear

Activation = Callable[[Tensor], Tensor]


class EncoderLayer(nn.Module):
    """Self-attention, then a two-layer MLP; each reads a layer norm and is added to its input."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, eps: float, activation: Activation) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(dim, eps)
        self.self_attn = SelfAttention(dim, heads)
        self.layer_norm2 = LayerNorm(dim, eps)
        self.mlp = Mlp(dim, mlp_dim, activation)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """x: [B, T, dim] -> [B, T, dim]; `causal` hides later tokens from earlier ones."""
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        return x + self.mlp(self.layer_norm2(x))


class LayerStack(nn.Module):
    """The layers, under the name that the files give them."""

    def __init__(self, layers: Iterable[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every (or every earlier) token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = Linear(dim, dim), Linear(dim, dim)
        self.v_proj, self.out_proj = Linear(dim, dim), Linear(dim, dim)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        q, k, v = (split_heads(part(x), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal)))


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, dim: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, T, d] -> [B, T, heads * d]."""
    return x.transpose(1, 2).flatten(-2)


def head_count(component: Component, width: int, official: Mapping[int, int]) -> int:
    """Number of attention heads: what the file declares, else that of the published model of this width.

    Raises:
        UsoflowError: `model_unsupported` if neither is there, or if it does not divide the width.
    """
    heads = component.declared.get("heads", official.get(width))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        kind = KIND_NAMES[component.kind]
        number = "an unknown number of" if heads is None else heads
        raise UsoflowError(
            "model_unsupported",
            f"{component.file.path.name}: a {kind} of width {width} with {number} heads.",
            remedy="Use the encoders of the tutorial: clip_l.safetensors for text and"
            " sigclip_vision_patch14_384.safetensors for pictures.",
        )
    return heads


def require_vocabulary(component: Component, rows: int, needed: int) -> None:
    """Raise UsoflowError `model_unsupported` for a table of fewer rows than the tokenizer has tokens."""
    if rows < needed:
        kind = KIND_NAMES[component.kind]
        raise UsoflowError(
            "model_unsupported",
            f"{component.file.path.name}: a {kind} with {rows} tokens instead of {needed}.",
        )

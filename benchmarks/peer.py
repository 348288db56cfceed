"""diffusers' FluxTransformer2DModel with the weights of one of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usoflow.models.embeddings import patchify, unpatchify
from usoflow.models.flux import Flux
from usoflow.models.references import position_ids

EMBEDDERS = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
}  # fmt: skip
QKV = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}


def twin(ours: Flux, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """diffusers' transformer with the same weights, in this dtype, on this device."""
    from diffusers import FluxTransformer2DModel

    c = ours.config
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(
            patch_size=1, in_channels=c.channels * 4, num_layers=c.double_blocks,
            num_single_layers=c.single_blocks, attention_head_dim=c.head_dim, num_attention_heads=c.heads,
            joint_attention_dim=c.text_dim, pooled_projection_dim=c.pooled_dim, guidance_embeds=True,
            axes_dims_rope=c.axes,
        )  # fmt: skip
    named = (pair for name, value in ours.state_dict().items() for pair in _renamed(name, value, c.hidden))
    state = {name: value.to(device, dtype, copy=True) for name, value in named}
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def velocity(
    theirs: nn.Module,
    latent: Tensor,
    text: Tensor,
    pooled: Tensor,
    *,
    guidance: float,
    references: Sequence[Tensor] = (),
    method: str = "uxo",
    style: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Steps of theirs, of a latent like this one and a sigma, on the inputs of `Flux.prepare`; what a
    pipeline prepares once is prepared here.

    Style tokens are put before the text tokens after their `context_embedder`, where ours puts them.
    """
    batch, dtype = len(latent), next(theirs.parameters()).dtype
    parts = [patchify(reference.expand(batch, *reference.shape[1:])) for reference in references]
    ids = position_ids(_size(latent), [_size(reference) for reference in references], method)
    styles = 0 if style is None else style.shape[1]
    embedder: Any = theirs.context_embedder
    embedder._forward_hooks.clear()
    if style is not None:
        tokens = style.to(dtype).expand(batch, -1, -1)
        embedder.register_forward_hook(lambda _module, _inputs, out: torch.cat([tokens, out], 1))
    device = latent.device
    inputs = {
        "encoder_hidden_states": text.expand(batch, -1, -1).to(dtype),
        "pooled_projections": pooled.expand(batch, -1).to(dtype),
        "guidance": torch.full((batch,), guidance, device=device),
        "img_ids": ids.to(device),
        "txt_ids": torch.zeros(text.shape[1] + styles, 3, device=device),
        "return_dict": False,
    }
    count = patchify(latent).shape[1]

    def step(x: Tensor, sigma: Tensor) -> Tensor:
        tokens = torch.cat([patchify(x), *parts], 1).to(dtype)
        answer = theirs(hidden_states=tokens, timestep=sigma.to(dtype).expand(batch), **inputs)[0]
        return unpatchify(answer[:, :count].to(x.dtype), x.shape)

    return step


def _size(latent: Tensor) -> tuple[int, int]:
    return latent.shape[-2], latent.shape[-1]


def _renamed(name: str, value: Tensor, hidden: int) -> Iterator[tuple[str, Tensor]]:
    stem, _, leaf = name.rpartition(".")
    if stem in EMBEDDERS:
        yield f"{EMBEDDERS[stem]}.{leaf}", value
    elif stem == "final_layer.adaLN_modulation.1":  # theirs has scale before shift
        yield f"norm_out.linear.{leaf}", torch.cat(value.chunk(2)[::-1])
    elif stem.startswith("double_blocks."):
        _, number, part = stem.split(".", 2)
        yield from _double(f"transformer_blocks.{number}.", part, leaf, value)
    else:
        _, number, part = stem.split(".", 2)
        yield from _single(f"single_transformer_blocks.{number}.", part, leaf, value, hidden)


def _double(to: str, part: str, leaf: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if part in NORMS:
        yield f"{to}{NORMS[part]}.weight", value
    elif part.endswith("qkv"):
        for name, piece in zip(QKV[part[:3]], value.chunk(3), strict=True):
            yield f"{to}attn.{name}.{leaf}", piece
    else:
        yield f"{to}{DOUBLE[part]}.{leaf}", value


def _single(to: str, part: str, leaf: str, value: Tensor, hidden: int) -> Iterator[tuple[str, Tensor]]:
    if part == "linear1":
        pieces = value.split([hidden, hidden, hidden, len(value) - 3 * hidden])
        for name, piece in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), pieces, strict=True):
            yield f"{to}{name}.{leaf}", piece
    elif part.startswith("norm."):
        yield f"{to}attn.norm_{part.split('.')[1][0]}.weight", value
    else:
        yield f"{to}{SINGLE[part]}.{leaf}", value

"""The LoRA of stage `subject`: where its branches are, how they begin, and their names in a file.

ByteDance's LoRA of USO is on the layers of attention. FLUX.1 has seen pictures of one subject side by side,
the pocket base has not, and what it lacks is in MLPs and modulations as much. So a LoRA may have pairs there
too, and begin as what an expert has learnt with all its weights (`redraw`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from usoflow.models.flux import Flux
from usoflow.models.weights import Linear, LowRank


@dataclass(frozen=True, slots=True)
class _Place:
    """A low-rank pair of a block.

    Attributes:
        name: of the pair in a file, after that of the block.
        layer: whose output it changes.
        rows: which rows: all, or those for q, k and v or the MLP of a single block's first layer.
        part: what the layer is of, see `add_lora`.
    """

    name: str
    layer: str
    rows: Literal["all", "qkv", "mlp"] = "all"
    part: Literal["attention", "mlp", "modulation"] = "attention"


# Attention has ByteDance's names, whose LoRA has nothing else; further pairs have those of diffusers.
_DOUBLE = (
    _Place("processor.qkv_lora1", "img_attn.qkv"),
    _Place("processor.proj_lora1", "img_attn.proj"),
    _Place("processor.qkv_lora2", "txt_attn.qkv"),
    _Place("processor.proj_lora2", "txt_attn.proj"),
    _Place("ff.net.0.proj", "img_mlp.0", part="mlp"),
    _Place("ff.net.2", "img_mlp.2", part="mlp"),
    _Place("ff_context.net.0.proj", "txt_mlp.0", part="mlp"),
    _Place("ff_context.net.2", "txt_mlp.2", part="mlp"),
    _Place("norm1.linear", "img_mod.lin", part="modulation"),
    _Place("norm1_context.linear", "txt_mod.lin", part="modulation"),
)
_SINGLE = (
    _Place("processor.qkv_lora", "linear1", rows="qkv"),
    _Place("processor.proj_lora", "linear2"),
    _Place("proj_mlp", "linear1", rows="mlp", part="mlp"),
    _Place("norm.linear", "modulation.lin", part="modulation"),
)
_BLOCKS = (
    ("double_blocks", "transformer.transformer_blocks", _DOUBLE),
    ("single_blocks", "transformer.single_transformer_blocks", _SINGLE),
)


@dataclass(frozen=True)
class LoraPair:
    """A branch, and the layer beside which it is.

    Attributes:
        layer: its name in the transformer.
        branch: with rows of that layer.
        names: of its lower and upper matrix in a file.
    """

    layer: str
    branch: LowRank
    names: tuple[str, str]


def add_lora(flux: Flux, rank: int, wide_rank: int, seed: int) -> list[LoraPair]:
    """Append trainable branches to layers of the blocks.

    The lower matrices are normal with variance 1 / inputs, the upper ones zero (arXiv 2106.09685).

    Args:
        flux: the transformer.
        rank: of the pairs on the layers of attention, which are all that ByteDance's LoRA has.
        wide_rank: of pairs on the MLPs, or 0 for none; those on the modulations, whose input varies little,
            have a quarter of it.
        seed: of the first weights.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = {"attention": rank, "mlp": wide_rank, "modulation": wide_rank // 4}
    return [
        _pair(flux, f"{blocks}.{number}", f"{diffusers}.{number}", place, ranks[place.part], generator)
        for blocks, diffusers, places in _BLOCKS
        for number in range(len(getattr(flux, blocks)))
        for place in places
        if ranks[place.part]
    ]


def _pair(
    flux: Flux, block: str, diffusers: str, place: _Place, rank: int, generator: torch.Generator
) -> LoraPair:
    name = f"{block}.{place.layer}"
    layer = _layer(flux, name)
    rows, inputs = layer.shape
    qkv = 3 * flux.config.hidden
    first, last = {"all": (0, rows), "qkv": (0, qkv), "mlp": (qkv, rows)}[place.rows]
    device, rank = layer.weight.device, min(rank, inputs, last - first)
    down = (torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(device)
    up = torch.zeros(last - first, rank, device=device)
    branch = LowRank(down.requires_grad_(), up.requires_grad_(), strength=1.0, first_row=first)
    layer.branches.append(branch)
    if place.part == "attention":
        stem, (lower, upper) = f"{block}.{place.name}", ("down", "up")
    else:
        stem, (lower, upper) = f"{diffusers}.{place.name}", ("lora_A", "lora_B")
    return LoraPair(name, branch, (f"{stem}.{lower}.weight", f"{stem}.{upper}.weight"))


def _layer(flux: Flux, name: str) -> Linear:
    layer = flux.get_submodule(name)
    assert isinstance(layer, Linear)
    return layer


@torch.no_grad()
def extract(pairs: Iterable[LoraPair], before: Flux, after: Flux) -> None:
    """Let a LoRA begin as what a transformer has learnt, as near as its ranks come.

    Each product becomes the best approximation of the difference of the weights (Eckart and Young, 1936:
    the largest singular values), shared evenly between its two matrices.
    """
    for pair in pairs:
        old, new = (_layer(flux, pair.layer).weight[pair.branch.rows] for flux in (before, after))
        left, values, right = torch.linalg.svd((new - old).float(), full_matrices=False)
        rank = len(pair.branch.down)
        share = values[:rank].sqrt()
        pair.branch.up.copy_(left[:, :rank] * share)
        pair.branch.down.copy_(share[:, None] * right[:rank])


def lora_parameters(pairs: Iterable[LoraPair]) -> dict[str, nn.Parameter]:
    """The branches' parameters by their names in a file."""
    found: dict[str, nn.Parameter] = {}
    for pair in pairs:
        found |= zip(pair.names, (pair.branch.down, pair.branch.up), strict=True)
    return found

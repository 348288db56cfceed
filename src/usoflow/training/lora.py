"""The LoRA of stage `subject`: where its branches are, how they begin, and their names in a file.

ByteDance's LoRA of USO is on the layers of attention. FLUX.1 has seen pictures of one subject side by side,
the pocket base has not, and what it lacks is in MLPs and modulations as much. So a LoRA may have pairs there
too, and begin as what an expert has learnt with all its weights (`redraw`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from usoflow.models.flux import Flux
from usoflow.models.lora_layouts import places
from usoflow.models.weights import Linear, LowRank

# What a block's pairs are called; where they are: `models.lora_layouts`. Attention has ByteDance's names,
# whose LoRA has nothing else; further pairs have those of diffusers.
_DOUBLE = {
    "attention": (
        "processor.qkv_lora1", "processor.proj_lora1", "processor.qkv_lora2", "processor.proj_lora2",
    ),
    "mlp": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "modulation": ("norm1.linear", "norm1_context.linear"),
}  # fmt: skip
_SINGLE = {
    "attention": ("processor.qkv_lora", "processor.proj_lora"),
    "mlp": ("proj_mlp",),
    "modulation": ("norm.linear",),
}
_BLOCKS = (
    ("double_blocks", "transformer_blocks", _DOUBLE),
    ("single_blocks", "single_transformer_blocks", _SINGLE),
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
    layers = {name: layer for name, layer in flux.named_modules() if isinstance(layer, Linear)}
    known = places({name: layer.shape for name, layer in layers.items()})
    pairs = []
    for part, stem in _stems(flux):
        if ranks[part]:
            name, ((first, rows),) = known[stem]
            branch = _branch(layers[name], first, rows, ranks[part], generator)
            pairs.append(LoraPair(name, branch, _names(part, stem)))
    return pairs


def _stems(flux: Flux) -> Iterator[tuple[str, str]]:
    """Part and name of each pair that there may be, block by block."""
    for blocks, diffusers, parts in _BLOCKS:
        for number in range(len(getattr(flux, blocks))):
            for part, names in parts.items():
                block = blocks if part == "attention" else diffusers
                yield from ((part, f"{block}.{number}.{name}") for name in names)


def _branch(layer: Linear, first: int, rows: int, rank: int, generator: torch.Generator) -> LowRank:
    _, inputs = layer.shape
    device, rank = layer.weight.device, min(rank, inputs, rows)
    down = (torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(device)
    up = torch.zeros(rows, rank, device=device)
    branch = LowRank(down.requires_grad_(), up.requires_grad_(), strength=1.0, first_row=first)
    layer.branches.append(branch)
    return branch


def _names(part: str, stem: str) -> tuple[str, str]:
    """Of the lower and the upper matrix in a file."""
    if part == "attention":
        return f"{stem}.down.weight", f"{stem}.up.weight"
    return f"transformer.{stem}.lora_A.weight", f"transformer.{stem}.lora_B.weight"


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

"""A LoRA on an fp8 weight: as a branch beside it, or merged and rounded to fp8 again. Time and error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.report import Table
from benchmarks.timing import in_turn
from usoflow.models.fp8 import LARGEST, STORED
from usoflow.models.kernels import Scratch
from usoflow.models.weights import Linear, LowRank

ROWS, INPUTS, RANK = 9216, 3072, 128  # q, k and v of a FLUX.1 block, under USO's LoRA
SHARE = 0.05  # of the LoRA's change in the weight's norm


def table(rounds: int, *, quick: bool) -> Table:
    """One layer in bf16, tokens of a 256x256 picture."""
    tokens = 64 if quick else 768
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, INPUTS, generator=generator) / INPUTS**0.5
    down = torch.randn(RANK, INPUTS, generator=generator) / INPUTS**0.5
    up = torch.randn(ROWS, RANK, generator=generator)
    up *= SHARE * weight.norm() / (up @ down).norm()
    x = torch.randn(tokens, INPUTS, generator=generator)

    stored, scale = _rounded(weight)
    exact = (stored.double() * scale.double() + up.double() @ down.double()).T
    branch = _layer(stored, scale)
    branch.branches.append(LowRank(down.bfloat16(), up.bfloat16(), strength=1.0))
    merged = _layer(*_rounded(stored.float() * scale + up @ down))
    layers = {"without LoRA": _layer(stored, scale), "branch": branch, "merged, rounded again": merged}
    expected = x.double() @ exact

    def way(layer: Linear) -> Callable[[], Tensor]:
        given = x.bfloat16()
        return lambda: layer(given)

    ways = {name: way(layer) for name, layer in layers.items()}
    with torch.inference_mode():
        errors = {name: float((ways[name]() - expected).norm() / expected.norm()) for name in ways}
    times = in_turn(ways, rounds)
    return Table(
        "A LoRA on an fp8 weight",
        f"One layer, {ROWS}x{INPUTS}, scaled fp8, computed in bf16; a LoRA of rank {RANK} that changes the"
        f" weight by {SHARE:.0%}; {tokens} tokens; medians of {rounds} in turn. Error: relative L2 against"
        " fp64 with the LoRA.",
        ["", "ms", "error"],
        [[name, f"{times.median(name) * 1000:.0f}", f"{errors[name]:.4f}"] for name in layers],
        raw={"seconds": dict(times.seconds), "errors": errors},
    )


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """In e4m3, with the scale that makes its largest value the format's."""
    scale = weight.abs().amax() / LARGEST
    return (weight / scale).to(STORED), scale


def _layer(weight: Tensor, scale: Tensor) -> Linear:
    layer = Linear(INPUTS, ROWS, bias=False)
    layer.weight, layer.scale_weight, layer.scratch = nn.Parameter(weight, False), scale, Scratch()
    return layer

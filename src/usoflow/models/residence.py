"""How a transformer's weights lie while it is used: ready, as stored, or passing through.

On a CPU, from fast and large to slow and small:

- ready: widened to the dtype of the computation and packed, once
- stored: as the file has them, mapped; each is widened when it is used, into one buffer
- passing: the same, and a block's pages are given back when it is done, while the next one's are read

On a GPU, blocks are resident as stored, as many as fit; the others pass through from pinned memory, the copy
of the next under the computation of this one. `Placement` says how much memory there is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from usoflow.models import pages
from usoflow.models.kernels import Scratch, pack
from usoflow.models.weights import Linear

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a network's parameters: as stored, ready, and of its blocks as stored, in order."""

    stored: int
    ready: int
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> Sizes:
        """From shapes alone."""
        return cls(
            _bytes(module),
            sum(
                layer.shape[0] * layer.shape[1] * dtype.itemsize
                for layer in module.modules()
                if isinstance(layer, Linear)
            ),
            tuple(map(_bytes, blocks)),
        )

    def resident(self, budget: int) -> int:
        """How many blocks, from the first, stay within a budget; two of the others pass through at a time."""
        if self.stored <= budget:
            return len(self.blocks)
        left = budget - (self.stored - sum(self.blocks)) - 2 * max(self.blocks, default=0)
        count = 0
        for size in self.blocks:
            left -= size
            if left < 0:
                break
            count += 1
        return count


def settle_on_cpu(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    dtype: torch.dtype,
    budget: int,
    *,
    as_stored: bool = False,
) -> str:
    """Lay the weights of a network; says how: "ready", "stored" or "passing"."""
    sizes = Sizes.of(module, blocks, dtype)
    if sizes.ready <= budget and not as_stored:
        for layer in _linear_layers(module):
            _make_ready(layer, dtype)
        return "ready"
    scratch = Scratch()
    for layer in _linear_layers(module):
        layer.scratch = scratch
    if sizes.stored <= budget:
        return "stored"
    _let_pages_pass(blocks)
    logger.info(
        "%.1f GB of weights in a budget of %.1f GB: blocks pass through.", sizes.stored / 1e9, budget / 1e9
    )
    return "passing"


def settle_on_gpu(module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, budget: int) -> int:
    """Move a network to a GPU, but for the blocks that do not fit; how many blocks are resident."""
    resident = Sizes.of(module, blocks, torch.bfloat16).resident(budget)
    passing = blocks[resident:]
    for part in (*blocks[:resident], *_but(module, blocks)):
        part.to(device)
    if passing:
        Passage(passing, device).attach()
        logger.info("%d of %d blocks stay on the GPU, the others pass through.", resident, len(blocks))
    return resident


class Passage:
    """Blocks whose weights come from pinned memory to a GPU, one ahead, and leave after use."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.home = [[(p, p.data.pin_memory()) for p in block.parameters()] for block in blocks]
        self.copies = torch.cuda.Stream(device)
        self.arrived: dict[int, Any] = {}

    def attach(self) -> None:
        """Let the blocks ask for their weights when they are called."""
        for number, block in enumerate(self.blocks):
            for parameter, pinned in self.home[number]:
                parameter.data = pinned
            block.register_forward_pre_hook(lambda _module, _inputs, number=number: self._enter(number))
            block.register_forward_hook(lambda _module, _inputs, _out, number=number: self._leave(number))

    def _enter(self, number: int) -> None:
        self._fetch(number)
        torch.cuda.current_stream(self.device).wait_event(self.arrived.pop(number))
        if len(self.blocks) > 1:
            self._fetch((number + 1) % len(self.blocks))

    def _fetch(self, number: int) -> None:
        if number in self.arrived or self.home[number][0][0].device == self.device:
            return
        with torch.cuda.stream(self.copies):
            for parameter, pinned in self.home[number]:
                parameter.data = pinned.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.copies)
        self.arrived[number] = event

    def _leave(self, number: int) -> None:
        """The allocator must not hand the memory to the copies before the computation is done with it."""
        for parameter, pinned in self.home[number]:
            parameter.data.record_stream(torch.cuda.current_stream(self.device))
            parameter.data = pinned


def _make_ready(layer: Linear, dtype: torch.dtype) -> None:
    """The weight as it is multiplied: wide, scaled, packed; the file's pages are given back."""
    before = layer.weight.data
    wide: Tensor = layer.plain_weight(dtype)
    layer.weight = nn.Parameter(pack(wide), requires_grad=False)
    layer.quantised = layer.scale_weight = None
    if layer.weight.data is not before:
        pages.give_back(pages.mapped([before]))


def _let_pages_pass(blocks: Sequence[nn.Module]) -> None:
    held = [pages.mapped(block.parameters()) for block in blocks]
    for number, block in enumerate(blocks):
        following = held[(number + 1) % len(held)]
        block.register_forward_pre_hook(lambda _module, _inputs, ranges=following: pages.read_ahead(ranges))
        block.register_forward_hook(
            lambda _module, _inputs, _out, ranges=held[number]: pages.give_back(ranges)
        )


def _linear_layers(module: nn.Module) -> list[Linear]:
    return [layer for layer in module.modules() if isinstance(layer, Linear)]


def _but(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The children of a module that hold none of the blocks."""
    held = set(map(id, blocks))
    return [child for child in module.children() if not held & {id(part) for part in child.modules()}]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())

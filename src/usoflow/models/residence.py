"""How a transformer's weights lie while it is used: ready, as stored, or passing through.

On a CPU, from fast and large to slow and small:

- ready: widened to the dtype of the computation and packed, once
- stored: as the file has them, mapped, read in by threads; each is widened when it is used, into one buffer
- passing: the same, and a block's pages are given back when it is done, while the next one's are read

Where it multiplies int8, the blocks' fp8 weights are not widened but turned into whole numbers, which take as
many bytes (`int8`): once, or each time, if they are passing.

T5's weights pass through in the same way, whatever memory there is: each is used once.

On a GPU, blocks are resident as stored, as many as fit; the others pass through (`passage`). Where it
multiplies fp8, the blocks' fp8 weights are not widened (`fp8`).
`Placement` says how much memory there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier, Lock

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from usoflow.models import fp8, int8, pages
from usoflow.models.flux import Modulation
from usoflow.models.kernels import Scratch, pack
from usoflow.models.passage import Passage
from usoflow.models.weights import Linear
from usoflow.settings import size_in_words

logger = logging.getLogger(__name__)

WORTH_GIVING_BACK = 1 << 20  # bytes of a weight: to find its pages takes some ms
_COUNTING = Lock()


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
            stored_bytes(module),
            sum(
                layer.shape[0] * layer.shape[1] * (1 if layer.in_int8 else dtype.itemsize)
                for layer in module.modules()
                if isinstance(layer, Linear)
            ),
            tuple(map(stored_bytes, blocks)),
        )

    def resident(self, budget: int) -> int:
        """How many blocks, from the first, stay within a budget; two of the others pass through at a time."""
        if self.stored <= budget:
            return len(self.blocks)
        left = budget - (self.stored - sum(self.blocks))
        fitting = (
            count
            for count in range(len(self.blocks))
            if sum(self.blocks[:count]) + 2 * max(self.blocks[count:]) <= left
        )
        return max(fitting, default=0)


def settle_on_cpu(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    dtype: torch.dtype,
    budget: int,
    *,
    as_stored: bool = False,
    packed: bool = True,
    eight_bits: bool = False,
) -> str:
    """Lay the weights of a network; says how: "ready", "stored" or "passing".

    What is to be compiled must not be packed: a compiler cannot look inside. With `eight_bits` the blocks'
    fp8 weights are multiplied in int8, where the CPU is fast at it.
    """
    scratch = Scratch()
    if eight_bits and dtype == fp8.WIDE and int8.multiplied_here():
        multiply_in_int8(blocks, scratch)
    sizes = Sizes.of(module, blocks, dtype)
    if sizes.ready <= budget and not as_stored:
        _make_ready(module, blocks, lambda layer: _hold_ready(layer, dtype, packed=packed))
        return "ready"
    for layer in _linear_layers(module):
        layer.scratch = scratch
    if sizes.stored <= budget:
        _make_ready(module, blocks, Linear.hold_in_int8)
        pages.bring(pages.mapped(module.parameters()))
        return "stored"
    _let_pages_pass(blocks)
    stored, most = size_in_words(sizes.stored), size_in_words(budget)
    logger.info("%s of weights in a budget of %s: blocks pass through.", stored, most)
    return "passing"


@contextmanager
def passing_once(t5: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """For one computation on a CPU: the weights pass through, and products are in this dtype.

    What lies between products stays in fp32, and nothing is held afterwards.
    """
    layers, scratch = _linear_layers(t5), Scratch()
    for layer in layers:
        layer.multiplied_in, layer.scratch = dtype, scratch
    hooks = _let_pages_pass(blocks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.multiplied_in = layer.scratch = None
        pages.give_back(pages.mapped(t5.parameters()))


def settle_on_gpu(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device,
    budget: int,
    *,
    pinned: int,
    eight_bits: bool = False,
) -> int:
    """Move a network to a GPU, but for the blocks that do not fit; how many blocks are resident.

    Args:
        module: all of it.
        blocks: in the order of their use.
        device: the GPU; a CPU can stand in for it.
        budget: bytes on the device.
        pinned: bytes of the host's memory that the other blocks may take (`passage`).
        eight_bits: multiply the blocks' fp8 weights in fp8, where the device does.
    """
    resident = Sizes.of(module, blocks, torch.bfloat16).resident(budget)
    for part in pages.brought([*_but(module, blocks), *blocks[:resident]], nn.Module.parameters):
        part.to(device)
    for layer in _linear_layers(module):  # scales are small
        layer.scale_weight = None if layer.scale_weight is None else layer.scale_weight.to(device)
    if eight_bits and fp8.multiplied_on(device):
        multiply_in_fp8(blocks, device)
    if resident < len(blocks):
        Passage(blocks[resident:], device, pinned=pinned)
        logger.info("%d of %d blocks stay on the GPU, the others pass through.", resident, len(blocks))
    return resident


def multiply_in_fp8(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Let the blocks' fp8 weights be multiplied as they are, but for those of the modulation."""
    for layer in _matrices(blocks):
        layer.multiply_in_fp8(device)


def multiply_in_int8(blocks: Sequence[nn.Module], scratch: Scratch) -> None:
    """Let the blocks' fp8 weights be multiplied in int8, but for those of the modulation."""
    for layer in _matrices(blocks):
        layer.multiply_in_int8(scratch)


def _matrices(blocks: Sequence[nn.Module]) -> Iterator[Linear]:
    """The blocks' layers, but for those of the modulation.

    What these give shifts and scales every token alike; their products, a row for each picture, cost nothing.
    """
    for block in blocks:
        exact = {
            layer for part in block.children() if isinstance(part, Modulation) for layer in part.modules()
        }
        yield from (layer for layer in _linear_layers(block) if layer not in exact)


def _make_ready(module: nn.Module, blocks: Sequence[nn.Module], lay: Callable[[Linear], None]) -> None:
    """Part by part; while the layers of one are laid, the next one's pages are read.

    Each thread lays a layer by itself: threads that share one wait for each other at every operation, and for
    the disk together. The file's pages of a weight that was laid elsewhere are given back.
    """
    parts = [*_but(module, blocks), *blocks]
    held = [pages.mapped(part.parameters()) for part in parts]
    inference = torch.is_inference_mode_enabled()

    def place(layer: Linear, ahead: Sequence[pages.Range]) -> None:
        pages.bring(ahead)
        before = layer.weight.data
        with torch.inference_mode(inference), torch.no_grad():  # both are a thread's own
            lay(layer)
        moved = layer.weight.is_mkldnn or layer.weight.data_ptr() != before.data_ptr()
        if moved and before.nbytes >= WORTH_GIVING_BACK:
            pages.give_back(pages.mapped([before]))

    with _threads_by_themselves() as pool:
        placed = [
            pool.submit(place, layer, [] if number else following)
            for part, following in zip(parts, [*held[1:], []], strict=True)
            for number, layer in enumerate(_linear_layers(part))
        ]
        for layer_placed in placed:
            layer_placed.result()


@contextmanager
def _threads_by_themselves() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, in each of which it has one; all others have as many as before.

    The number is a thread's own, but one that has not computed yet takes what was set last in any.
    """
    with _COUNTING:  # two that load at once would take each other's numbers
        threads = torch.get_num_threads()
        pool, all_there = ThreadPoolExecutor(threads), Barrier(threads)
        try:
            for counted in [pool.submit(_count_one, all_there) for _ in range(threads)]:
                counted.result()
        finally:
            all_there.abort()  # where one could not begin the others need not wait
            torch.set_num_threads(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # where one has failed the others need not begin


def _count_one(all_there: Barrier) -> None:
    torch.get_num_threads()  # takes what was set last: not later, instead of the next line's
    torch.set_num_threads(1)
    all_there.wait()  # so no thread does this twice


def _hold_ready(layer: Linear, dtype: torch.dtype, *, packed: bool) -> None:
    """The weight as it is multiplied: in whole numbers, or wide, scaled, packed."""
    if layer.in_int8:
        layer.hold_in_int8()
        return
    wide: Tensor = layer.plain_weight(dtype)
    layer.weight = nn.Parameter(pack(wide) if packed else wide, requires_grad=False)
    layer.quantised = layer.scale_weight = None


def _let_pages_pass(blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    held, hooks = [pages.mapped(block.parameters()) for block in blocks], []
    for number, block in enumerate(blocks):
        following = held[(number + 1) % len(held)]
        hooks += [
            block.register_forward_pre_hook(
                lambda _module, _inputs, ranges=following: pages.read_ahead(ranges)
            ),
            block.register_forward_hook(
                lambda _module, _inputs, _out, ranges=held[number]: pages.give_back(ranges)
            ),
        ]
    return hooks


def _linear_layers(module: nn.Module) -> list[Linear]:
    return [layer for layer in module.modules() if isinstance(layer, Linear)]


def _but(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The children of a module that hold none of the blocks."""
    held = set(map(id, blocks))
    return [child for child in module.children() if not held & {id(part) for part in child.modules()}]


def stored_bytes(module: nn.Module) -> int:
    """Of all parameters, as they are stored."""
    return sum(parameter.nbytes for parameter in module.parameters())

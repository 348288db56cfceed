"""Blocks that pass through a GPU: their weights come while the block before them computes.

On the device they lie in one of two buffers, made once and used in turn: while a block computes in one, the
next one's weights are copied into the other, by a stream of copies beside that of the computation. Events
hold both back: a block waits for its weights, a copy for the block that used its buffer before.

On the host the weights of a block lie pinned, in one piece, as far as memory goes; such copies run by
themselves. Several blocks share such memory, of which torch makes powers of two (`pinned_together`). The
other blocks stay pages of the file: their copies keep the host busy, but not the device.

Streams and events are torch.cuda's; on a CPU, which can stand in for a GPU, torch.cpu's, which do nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from usoflow.models import pages

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes, as CUDA's own allocations have it at least
MOST_PINNED_AT_ONCE = 1 << 31  # bytes: what cannot be had costs no more than so much


class Home:
    """Where the parameters of a block lie while it is not used, and where each goes in a buffer.

    Attributes:
        size: bytes that the block takes in a buffer.
        pinned: all of it in one piece, pinned; None while it lies in pages of the file.
    """

    def __init__(self, block: nn.Module) -> None:
        self.parameters = list(block.parameters())
        self.stored = [parameter.data for parameter in self.parameters]
        self.offsets, self.size = [], 0
        for tensor in self.stored:
            self.offsets.append(self.size)
            self.size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.pinned: Tensor | None = None

    def pin(self, memory: Tensor) -> None:
        """Copy the weights to memory that a GPU reads by itself; the pages of the file are given back."""
        moved = self.places(memory)
        for place, tensor in zip(moved, self.stored, strict=True):
            place.copy_(tensor)
        pages.give_back(pages.mapped(self.stored))
        self.pinned, self.stored = memory, moved
        self.leave()

    def places(self, memory: Tensor) -> list[Tensor]:
        """The parameters as they lie in a buffer (uint8 [size or more])."""
        return [
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(self.offsets, self.stored, strict=True)
        ]

    def copy_to(self, buffer: Tensor) -> None:
        """Into a buffer on the device, without waiting where memory is pinned."""
        if self.pinned is not None:
            buffer[: self.size].copy_(self.pinned, non_blocking=True)
            return
        for place, tensor in zip(self.places(buffer), self.stored, strict=True):
            place.copy_(tensor, non_blocking=True)

    def enter(self, buffer: Tensor) -> None:
        """The block's parameters are those in the buffer."""
        for parameter, place in zip(self.parameters, self.places(buffer), strict=True):
            parameter.data = place

    def leave(self) -> None:
        """The block's parameters are those on the host again."""
        for parameter, tensor in zip(self.parameters, self.stored, strict=True):
            parameter.data = tensor


def pinned_together(sizes: Sequence[int], room: int) -> list[int]:
    """How many blocks share each piece of pinned memory, from the first on, as far as there is room.

    torch makes the next power of two of a piece: each has as many blocks as leave the least part of it idle.

    Args:
        sizes: bytes of the blocks.
        room: bytes that may be pinned.
    """
    counts: list[int] = []
    while fitting := _filled(sizes[sum(counts) :], min(room, MOST_PINNED_AT_ONCE)):
        count, (taken, _) = max(fitting.items(), key=lambda item: item[1][1])
        counts.append(count)
        room -= taken
    return counts


def _filled(sizes: Sequence[int], most: int) -> dict[int, tuple[int, float]]:
    """For each number of blocks that fit into one piece: its bytes, and which part of them is used."""
    pieces = ((count, size, 1 << (size - 1).bit_length()) for count, size in enumerate(accumulate(sizes), 1))
    return {count: (taken, size / taken) for count, size, taken in pieces if taken <= most}


@dataclass
class Buffer:
    """Memory on the device for the weights of a block.

    Attributes:
        memory: uint8.
        arrived: the copy into it is done.
        done: so is the computation with what it held before.
        holds: number of the block whose weights are there or on their way.
    """

    memory: Tensor
    arrived: Any
    done: Any
    holds: int | None = None


class Passage:
    """Lets the weights of blocks come to a device, one block ahead, and leave after use.

    Modules that share the blocks' parameters (`library`) share the hooks too; one computes at a time.

    Args:
        blocks: in the order of their use; hooks are added to them.
        device: where they compute.
        pinned: bytes of host memory that may be pinned.
        streams: with Stream, Event, stream and current_stream, as torch.cuda has them; the device's.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device, *, pinned: int, streams: Any = None
    ) -> None:
        self._streams = streams or (torch.cuda if device.type == "cuda" else torch.cpu)
        self._device = device
        self._homes = [Home(block) for block in blocks]
        with self._there(), torch.inference_mode(False):  # else only inference may write it again
            self._copies = self._streams.Stream()
            self._buffers = self._made(max(home.size for home in self._homes))
            self._pin(pinned)
        self._turn = 0
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _module, _inputs, number=number: self._enter(number))
            block.register_forward_hook(lambda _module, _inputs, _out, number=number: self._leave(number))

    def _made(self, size: int) -> list[Buffer]:
        made = []
        for _ in range(min(2, len(self._homes))):
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            if self._device.type == "cuda":
                memory.record_stream(self._copies)  # freed, it is not used again before the last copy is done
            made.append(Buffer(memory, self._streams.Event(), self._streams.Event()))
        self._copies.wait_stream(self._streams.current_stream())  # what used this memory before is done
        return made

    def _pin(self, room: int) -> None:
        sizes = [home.size for home in self._homes]
        counts, done, reason = pinned_together(sizes, room), 0, "the host's memory is used up"
        homes = pages.brought(self._homes[: sum(counts)], lambda home: home.stored)
        for count in counts:
            shares = sizes[done : done + count]
            try:
                memory = torch.empty(
                    sum(shares), dtype=torch.uint8, device="cpu", pin_memory=self._device.type == "cuda"
                )
            except RuntimeError as error:  # the system has no such memory
                reason = str(error)
                break
            for share, home in zip(memory.split(shares), homes, strict=False):
                home.pin(share)
            done += count
        if done < len(sizes):
            logger.info("%d of %d blocks lie pinned: %s.", done, len(sizes), reason)

    def _there(self) -> AbstractContextManager[object]:
        """Its device is the current one, of which streams and events are: threads have each their own."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _enter(self, number: int) -> None:
        with self._there():
            buffer = self._holding(number) or self._fetch(number)
            buffer.arrived.wait()
        self._homes[number].enter(buffer.memory)

    def _leave(self, number: int) -> None:
        """The next copy begins here, where this block is under way: it may keep the host busy."""
        self._homes[number].leave()
        buffer, following = self._holding(number), (number + 1) % len(self._homes)
        assert buffer is not None
        with self._there():
            buffer.done.record()
            if self._holding(following) is None:
                self._fetch(following)

    def _holding(self, number: int) -> Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.holds == number), None)

    def _fetch(self, number: int) -> Buffer:
        """Begin the copy into the buffer that was filled longest ago."""
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer.holds = None  # while it is neither: a copy may be interrupted
        with self._streams.stream(self._copies):
            buffer.done.wait()
            self._copy(number, buffer)
            buffer.arrived.record()
        buffer.holds = number
        return buffer

    def _copy(self, number: int, buffer: Buffer) -> None:
        self._homes[number].copy_to(buffer.memory)


def give_back_pinned() -> None:
    """What was pinned and is freed goes back to the system, not to the next model, where torch can do it."""
    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()

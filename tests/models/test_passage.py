"""Blocks that pass through a device: two buffers, one block ahead, and nothing overwritten that is in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks import lora_of, transformer_of
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_flux
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.passage import MOST_PINNED_AT_ONCE, Buffer, Passage, pinned_together
from usoflow.models.placement import Placement

CPU = torch.device("cpu")
Clock = dict[int, int]  # of each stream, how much of what it was given must be done


class Stream:
    """Work in order. Its clock tells what is done, on all streams, before what it is given next."""

    def __init__(self) -> None:
        self.clock: Clock = {id(self): 0}

    def wait_stream(self, other: Stream) -> None:
        self.wait(other.clock)

    def wait(self, clock: Clock) -> None:
        self.clock |= {key: max(value, self.clock.get(key, 0)) for key, value in clock.items()}

    def work(self) -> Clock:
        """One more piece of work; what is done when it is."""
        self.clock[id(self)] += 1
        return dict(self.clock)


class Streams:
    """torch.cuda's streams and events without a device: who waits for whom."""

    def __init__(self) -> None:
        self.current = self.compute = Stream()
        self.Stream = Stream
        self.Event = lambda: Event(self)

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, other: Stream) -> Iterator[None]:
        before, self.current = self.current, other
        yield
        self.current = before


@dataclass
class Event:
    streams: Streams
    clock: Clock = field(default_factory=dict)

    def record(self) -> None:
        self.clock = dict(self.streams.current.clock)

    def wait(self) -> None:
        self.streams.current.wait(self.clock)


@dataclass
class Use:
    """A copy into a buffer, or a computation with it; `done`: clock of its stream after it."""

    kind: str
    block: int
    buffer: int
    stream: Stream
    done: Clock
    known: Clock  # what was done before it began


class Watched(Passage):
    """Keeps a record of every use of a buffer."""

    def __init__(self, blocks: list[nn.Module], streams: Streams) -> None:
        self.uses: list[Use] = []
        super().__init__(blocks, CPU, pinned=10**9, streams=streams)
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _m, _i, number=number: self._computes(number))

    def _copy(self, number: int, buffer: Buffer) -> None:
        self._note("copy", number, buffer)
        super()._copy(number, buffer)

    def _computes(self, number: int) -> None:
        buffer = self._holding(number)
        assert buffer is not None, "what computes is there"
        self._note("compute", number, buffer)

    def _note(self, kind: str, number: int, buffer: Buffer) -> None:
        stream = self._streams.current_stream()
        known = dict(stream.clock)
        self.uses.append(Use(kind, number, id(buffer), stream, stream.work(), known))


def blocks_of(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    sizes = [8, 24, 16, 8, 40, 16][:count]
    blocks = [nn.Sequential(nn.Linear(8, size), nn.Linear(size, 8)) for size in sizes]
    return [block.requires_grad_(False) for block in blocks]


def through(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_no_buffer_is_overwritten_in_use_nor_used_before_it_is_filled(count: int) -> None:
    """Of two uses of a buffer, of which one is a copy, the later one waits for the earlier one."""
    blocks, streams, x = blocks_of(count), Streams(), torch.randn(2, 8)
    expected = through(blocks, x)
    watched = Watched(blocks, streams)
    for _ in range(3):
        assert torch.equal(through(blocks, x), expected)
    assert len({use.buffer for use in watched.uses}) == min(2, count)
    for later, use in enumerate(watched.uses):
        for earlier in watched.uses[:later]:
            if earlier.buffer == use.buffer and "copy" in (earlier.kind, use.kind):
                key = id(earlier.stream)
                assert use.known.get(key, 0) >= earlier.done[key], (earlier, use)


def test_a_copy_runs_beside_the_computation_before_it() -> None:
    """It waits for the block that used its buffer, not for the one that computes now."""
    blocks, streams = blocks_of(6), Streams()
    watched = Watched(blocks, streams)
    through(blocks, torch.randn(2, 8))
    through(blocks, torch.randn(2, 8))
    compute = id(streams.compute)
    copies = [use for use in watched.uses if use.kind == "copy"]
    assert [use.block for use in copies] == [0, 1, 2, 3, 4, 5] * 2 + [0]
    for use in copies[2:]:
        place = watched.uses.index(use)
        beside = next(u for u in reversed(watched.uses[:place]) if u.kind == "compute")
        assert use.known.get(compute, 0) < beside.done[compute]


def test_what_stays_in_two_buffers_is_copied_once() -> None:
    blocks = blocks_of(2)
    watched = Watched(blocks, Streams())
    for _ in range(3):
        through(blocks, torch.randn(2, 8))
    assert [use.block for use in watched.uses if use.kind == "copy"] == [0, 1]


def test_a_copy_that_was_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, x = blocks_of(6), torch.randn(2, 8)
    expected = through(blocks, x)
    passage = Passage(blocks, CPU, pinned=0)
    for stopped in range(6):

        def stop(number: int, buffer: Buffer, stopped: int = stopped) -> None:
            if number == stopped:
                raise KeyboardInterrupt
            Passage._copy(passage, number, buffer)

        monkeypatch.setattr(passage, "_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            through(blocks * 2, x)
        monkeypatch.undo()
        assert torch.equal(through(blocks, x), expected)


def test_after_a_block_that_failed_all_is_as_before() -> None:
    blocks, x = blocks_of(6), torch.randn(2, 8)
    expected = through(blocks, x)
    Passage(blocks, CPU, pinned=0)
    with pytest.raises(RuntimeError):
        through(blocks[:3], x[:, :5])
    with pytest.raises(RuntimeError):
        blocks[4](x[:, :5])
    for _ in range(2):
        assert torch.equal(through(blocks, x), expected)


@pytest.mark.parametrize("inference", [False, True])
def test_loras_share_what_passes(small_models: Path, inference: bool) -> None:
    """A view with LoRAs and the network itself, in turn, as runs with different LoRAs use them."""
    file, lora = transformer_of(small_models), lora_of(small_models)
    with torch.inference_mode(inference), torch.no_grad():
        passing, plain = (ModelLibrary(Placement(CPU, torch.float32)) for _ in range(2))
        module = load_flux(file)
        Passage(module.blocks[1:], CPU, pinned=10**9)
        passing._modules[(file.file.fingerprint, "flux", "default")] = module
        for uses in ((), (LoraUse(lora, 1.0),), (), (LoraUse(lora, 0.5),)):
            ours, theirs = (library.flux(file, uses, "default") for library in (passing, plain))
            assert (ours is module) == (not uses)
            torch.manual_seed(0)
            c = ours.config
            latent, text, pooled = torch.randn(1, 16, 8, 8), torch.randn(1, 4, c.text_dim), torch.randn(1, 32)
            found, expected = (
                flux(latent, torch.tensor(0.5), flux.prepare(text, pooled, (8, 8))) for flux in (ours, theirs)
            )
            assert float((found - expected).norm() / expected.norm()) < 1e-4


DOUBLE, SINGLE = 339_738_624, 141_557_760  # bytes of the matrices of FLUX.1's blocks in fp8


def pieces_of(sizes: list[int], counts: list[int]) -> list[int]:
    rest = iter(sizes)
    return [sum(islice(rest, count)) for count in counts]


def taken(sizes: list[int], counts: list[int]) -> int:
    """By torch, which makes the next power of two of each piece."""
    return sum(1 << (piece - 1).bit_length() for piece in pieces_of(sizes, counts))


@pytest.mark.parametrize("wide", [1, 2])
@pytest.mark.parametrize("passing", [20, 40, 57])
def test_pinned_memory_is_not_left_idle(wide: int, passing: int) -> None:
    """A piece for each block would take 1.6 to 1.9 times as much as the blocks."""
    sizes = [wide * size for size in [DOUBLE] * 19 + [SINGLE] * 38][-passing:]
    counts = pinned_together(sizes, 10**12)
    assert sum(counts) == passing
    assert taken(sizes, counts) < 1.2 * sum(sizes)
    assert max(pieces_of(sizes, counts)) <= MOST_PINNED_AT_ONCE


@pytest.mark.parametrize("room", [0, 10**8, 10**9, 3 * 10**9, 10**10])
def test_no_more_is_pinned_than_there_is_room_for(room: int) -> None:
    sizes = [SINGLE] * 38
    counts = pinned_together(sizes, room)
    assert taken(sizes, counts) <= room
    assert (sum(counts) > 0) == (room >= taken(sizes, [1]))


def test_blocks_share_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own part; those that there is no room for stay where they are."""
    blocks, x = blocks_of(6), torch.randn(2, 8)
    expected = through(blocks, x)
    monkeypatch.setattr("usoflow.models.passage.pinned_together", lambda sizes, room: [3, 2])
    pinned = [home.pinned for home in Passage(blocks, CPU, pinned=10**9)._homes]
    assert [memory is not None for memory in pinned] == [True] * 5 + [False]
    storages = [memory.untyped_storage().data_ptr() for memory in pinned if memory is not None]
    assert len(set(storages[:3])) == len(set(storages[3:])) == 1
    assert storages[0] != storages[3]
    for _ in range(2):
        assert torch.equal(through(blocks, x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("pinned", [0, 10**9])
def test_on_a_gpu(pinned: int) -> None:
    device = torch.device("cuda")
    blocks, x = blocks_of(6), torch.randn(2, 8)
    expected = through(blocks, x)
    Passage(blocks, device, pinned=pinned)
    for _ in range(20):
        assert torch.allclose(through(blocks, x.to(device)).cpu(), expected, atol=1e-4)

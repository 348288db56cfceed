"""Pages of memory: given back to the system, or asked for as large ones; files' pages are also read ahead.

A mapped file counts as memory of the process while its pages are touched. Giving them back loses nothing:
what is touched again comes from the system's file cache or the disk. Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Range = tuple[int, int]  # first address, bytes: whole pages

_MAPS = Path("/proc/self/maps")
_DELETED = "(deleted)"  # so the system names files that are gone, and also memory that never was a file
_WILL_NEED, _DO_NOT_NEED, _HUGE, _POPULATE_READ = 3, 4, 14, 22  # madvise(2)
_AT_ONCE = 32 << 20  # bytes that a thread reads before it takes the next ones
_ASKED_AT_ONCE = 128 << 10  # bytes; Linux reads no more than one request to a disk, and this much as it comes
_READERS = 4  # threads: a disk is faster when it is asked for several things


def mapped(tensors: Iterable[Tensor]) -> list[Range]:
    """The whole pages of those tensors that lie in mapped files; tensors in memory of their own have none."""
    if not sys.platform.startswith("linux"):
        return []
    files = _files()
    strided = (tensor for tensor in tensors if tensor.layout == torch.strided and tensor.device.type == "cpu")
    places = ((tensor.data_ptr(), tensor.nbytes) for tensor in strided)
    inside = (
        (start, size) for start, size in places if any(a <= start and start + size <= b for a, b in files)
    )
    return [found for place in inside if (found := _whole_pages(*place))[1] > 0]


def give_back(ranges: Sequence[Range]) -> None:
    """The process holds these pages no longer."""
    if ranges:  # elsewhere than on Linux there are none, and Windows has no such call
        _advise(ranges, _DO_NOT_NEED)


def ask_for_large(new: Tensor) -> None:
    """The system is asked for pages of 2 MiB, not 4 KiB, for a tensor to which nothing was written yet.

    It clears each page at its first touch; to come to a small one takes longer than to clear it.
    """
    if sys.platform.startswith("linux") and new.device.type == "cpu":
        _advise([_whole_pages(new.data_ptr(), new.nbytes)], _HUGE)


def read_ahead(ranges: Sequence[Range]) -> None:
    """The system begins to read these pages into its cache, in a thread: of a busy disk, asking takes time.

    Beside a computation, from which `bring` would take the cores.
    """
    if ranges:
        Thread(target=_ask_ahead, args=(ranges,), daemon=True).start()


def bring(ranges: Sequence[Range]) -> None:
    """Begin to read these pages into place, in the order in which they lie, in threads of their own.

    Whoever touches a page before it has come waits for that page alone.
    """
    if not ranges:
        return
    pieces = deque(_pieces(sorted(ranges), _AT_ONCE))
    for _ in range(min(_READERS, os.cpu_count() or 1)):
        Thread(target=_populate, args=(pieces,), name="usoflow-read", daemon=True).start()


def brought(parts: Sequence[T], tensors: Callable[[T], Iterable[Tensor]]) -> Iterator[T]:
    """The parts one after another; while one is worked with, the pages of the next one's tensors come."""
    held = [mapped(tensors(part)) for part in parts]
    for part, following in zip(parts, [*held[1:], []], strict=True):
        bring(following)
        yield part


def _pieces(ranges: Sequence[Range], at_once: int) -> Iterator[Range]:
    for start, size in ranges:
        for first in range(start, start + size, at_once):
            yield first, min(at_once, start + size - first)


def _populate(pieces: deque[Range]) -> None:
    """Take one after another until there is none; a process that ends need not wait for it."""
    while True:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        if _advise([piece], _POPULATE_READ) != 0:  # before Linux 5.14, which can only be asked to read ahead
            _ask_ahead([piece])


def _ask_ahead(ranges: Sequence[Range]) -> None:
    _advise(_pieces(ranges, _ASKED_AT_ONCE), _WILL_NEED)


def _advise(ranges: Iterable[Range], advice: int) -> int:
    """0, or what the system said last to a range that it could not do this with."""
    said, libc = 0, ctypes.CDLL(None)
    for start, size in ranges:
        said = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice) or said
    return said


def _files() -> list[Range]:
    """First and last address of every mapping of a file's data."""
    text = _MAPS.read_bytes().decode("utf-8", "surrogateescape")  # names may be of any bytes but a line's end
    lines = (line.split(maxsplit=5) for line in text.split("\n"))
    spans = (parts[0].split("-") for parts in lines if len(parts) == 6 and _is_data(parts[1], parts[5]))
    return [(int(first, 16), int(last, 16)) for first, last in spans]


def _is_data(permissions: str, name: str) -> bool:
    return name.startswith("/") and not name.endswith(_DELETED) and "x" not in permissions


def trim() -> None:
    """Give the system back what was freed and is kept for the next allocation (glibc; else nothing)."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def _whole_pages(start: int, size: int) -> Range:
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    return first, max(0, last - first)

"""Pages of memory given back to the system; those of mapped model files, also read ahead.

A mapped file counts as memory of the process while its pages are touched. Giving them back loses nothing:
what is touched again comes from the system's file cache or the disk. Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Range = tuple[int, int]  # first address, bytes: whole pages

_MAPS = Path("/proc/self/maps")
_DELETED = "(deleted)"  # so the system names files that are gone, and also memory that never was a file
_WILL_NEED, _DO_NOT_NEED = 3, 4  # madvise(2)


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
    _advise(ranges, _DO_NOT_NEED)


def read_ahead(ranges: Sequence[Range]) -> None:
    """The system begins to read these pages, without waiting for it."""
    _advise(ranges, _WILL_NEED)


def _advise(ranges: Sequence[Range], advice: int) -> None:
    if not ranges:
        return
    libc = ctypes.CDLL(None)
    for start, size in ranges:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def _files() -> list[Range]:
    """First and last address of every mapping of a file's data."""
    lines = (line.split(maxsplit=5) for line in _MAPS.read_text(encoding="utf-8").splitlines())
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
    return first, last - first

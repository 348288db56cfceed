"""How much memory a phase of a run needed at its peak; and memory that a run keeps while it lasts."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from usoflow.models import pages

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the high water mark of the resident set

# mallopt(3). Above M_MMAP_THRESHOLD (glibc raises it by itself, to 32 MiB at most) each allocation is made of
# new pages and given back when it is freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_GLIBC_MOST = 32 << 20
_KEPT = 1 << 30  # an activation of a run is smaller


@contextmanager
def kept_memory() -> Iterator[None]:
    """What is freed meanwhile is used again, instead of being given back to the system and asked for anew.

    The activations of a step are tens to hundreds of MB. glibc would map each of them anew, and the system
    clear every page at its first touch, which takes as long as the arithmetic on it; so it is told to keep
    what is freed, until the end. That holds for the main thread: of what others free, glibc keeps 64 MiB.
    Elsewhere than with glibc nothing happens.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT - 1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _GLIBC_MOST)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _GLIBC_MOST)
        pages.trim()


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


class PeakMemory:
    """Measures from its making: `bytes()` is the most that was held since.

    On a CUDA device, memory allocated there; else the resident set of the process (Linux; elsewhere the
    peak of the whole process, which does not fall again). Mapped pages of model files count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):  # not Linux, or not allowed: the peak since the process began
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if _STATUS.exists():
            match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
            return int(match.group(1)) * 1024 if match else 0
        return _peak_of_process()


def _peak_of_process() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

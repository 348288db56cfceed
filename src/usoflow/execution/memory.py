"""How much memory a phase of a run needed at its peak."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the high water mark of the resident set


class PeakMemory:
    """Measures from its making: `bytes()` is the most that was held since.

    On a CUDA device, memory allocated there; else the resident set of the process (Linux; elsewhere the
    peak of the whole process, which does not fall again). Mapped pages of model files count.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):  # not Linux, or not allowed: the peak since the process began
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def bytes(self) -> int:
        """The peak so far."""
        if self._cuda:
            return int(torch.cuda.max_memory_allocated())
        if _STATUS.exists():
            match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
            return int(match.group(1)) * 1024 if match else 0
        return _peak_of_process()


def _peak_of_process() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""Memory that a run keeps, and that is given back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from usoflow.execution.memory import kept_memory
from usoflow.models import pages

MB = 1 << 20


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure() -> list[int]:
    """Bytes that are resident before a run, after what it freed, and after that was given back."""
    found = [resident()]
    with kept_memory():
        held = [torch.ones(n, dtype=torch.uint8) for n in [40 * MB, 4096] * 8]
        small = held[1::2]  # what lies between keeps the heap from shrinking by itself
        del held
        found.append(resident())
    pages.trim()
    found.append(resident())
    assert all(part.all() for part in small)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is told what to do")
def test_what_is_freed_is_kept_until_it_is_given_back() -> None:
    """In a process of its own: what others have freed in this one would be used again."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    before, freed, given_back = json.loads(done.stdout)
    assert freed > before + 300 * MB
    assert given_back < before + 20 * MB


if __name__ == "__main__":
    print(json.dumps(measure()))

"""Memory that a run keeps, and that is given back."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from usoflow.execution.memory import kept_memory
from usoflow.models import pages

MB = 1 << 20


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is told what to do")
def test_what_is_freed_is_kept_until_it_is_given_back() -> None:
    before = resident()
    with kept_memory():
        held = [torch.ones(n, dtype=torch.uint8) for n in [40 * MB, 4096] * 8]
        small = held[1::2]  # what lies between keeps the heap from shrinking by itself
        del held
        assert resident() > before + 300 * MB
    pages.trim()
    assert resident() < before + 20 * MB
    assert all(part.all() for part in small)

"""Custom nodes that no worker should have: each ends the process, or its job, in a way of its own."""

import ctypes
import resource
from pathlib import Path

import torch


class Bad:
    CATEGORY = "deadly"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {}}


class Segfault(Bad):
    def run(self):
        ctypes.string_at(0)


class NoMemoryLeft(Bad):
    """Asks for more than the limit on the address space that it sets."""

    def run(self):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**26
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return (torch.ones(1, 50_000, 50_000, 3),)


class DiesOfTheLimit(NoMemoryLeft):
    """The same in a C library that does not look whether it got what it asked for."""

    def run(self):
        try:
            super().run()
        except (RuntimeError, MemoryError):
            libc = ctypes.CDLL(None)
            libc.malloc.restype = ctypes.c_void_p
            ctypes.memset(libc.malloc(2**30) or 0, 1, 2**30)


class Raises(Bad):
    def run(self):
        raise ValueError("what the author says")


class Exits(Bad):
    def run(self):
        raise SystemExit("what the author says")


NODE_CLASS_MAPPINGS = {c.__name__: c for c in (Segfault, NoMemoryLeft, DiesOfTheLimit, Raises, Exits)}

"""A worker with nodes that no worker should have: each ends it, or the job, in a way of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

from usoflow.nodes import registry
from usoflow.nodes.context import Shown
from usoflow.nodes.sockets import Image
from usoflow.schema.node import NodeRegistry, node
from usoflow.service.worker import serve


@node("Crashes", category="test")
def crashes() -> Image:
    """Reads address 0."""
    ctypes.string_at(0)
    raise AssertionError


@node("Aborts", category="test")
def aborts() -> Image:
    """As an assertion in a library does."""
    os.abort()


@node("Exits", category="test")
def exits() -> Image:
    """Ends the process without a word."""
    os._exit(3)


@node("Raises", category="test")
def raises() -> Image:
    """A defect."""
    raise ZeroDivisionError


@node("Hungry", category="test")
def hungry() -> Image:
    """Wants a terabyte."""
    import torch

    return torch.ones(1, 500_000, 500_000, 1)


@node("Sleeps", category="test")
def sleeps() -> Image:
    """Does not look whether it is to stop."""
    time.sleep(600)
    raise AssertionError


@node("Prints", category="test")
def prints() -> Image:
    """Writes to the pipe's file descriptor."""
    import torch

    print('{"message": "Done"}', flush=True)
    os.write(1, b'{"message": "Done"}\n')
    return torch.zeros(1, 8, 8, 3)


@node("Reads", category="test")
def reads() -> Image:
    """Reads the pipe's other file descriptor, as a program that it starts may."""
    import torch

    assert os.read(0, 100) == b""
    assert subprocess.run(["cat"], capture_output=True, check=True).stdout == b""
    return torch.zeros(1, 8, 8, 3)


@node("Stops", category="test")
def stops() -> Image:
    """Starts a program, and ends it as one ends programs."""
    import torch

    program = subprocess.Popen(["sleep", "600"])
    program.terminate()
    assert program.wait(60) == -signal.SIGTERM
    return torch.zeros(1, 8, 8, 3)


@node("Deep", category="test", output_node=True)
def deep() -> Shown:
    """Shows what no message can hold."""
    nested: list[Any] = []
    for _ in range(600):
        nested = [nested]
    return Shown(other={"x": nested})


if __name__ == "__main__":
    if "HANGS" in os.environ:  # as a custom node that waits for the network where it is imported
        time.sleep(600)
    own = [crashes, aborts, exits, raises, hungry, sleeps, prints, reads, stops, deep]
    serve(NodeRegistry([*registry().values(), *own]), sys.argv[1])

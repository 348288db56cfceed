"""Files that a loss of power leaves whole: what is said to be there has come to the disk; and checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_READABLE = "rb" if os.name == "posix" else "rb+"  # Windows syncs only what may be written


def put(partial: Path, whole: Path) -> None:
    """Give a file its name; content and name are on the disk when this returns."""
    with partial.open(_READABLE) as file:
        os.fsync(file.fileno())
    partial.replace(whole)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        with suppress(OSError), _opened(whole.parent) as folder:  # nor where it may not be read
            os.fsync(folder)  # which some network drives do not do


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    number = os.open(folder, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)

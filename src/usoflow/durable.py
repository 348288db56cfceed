"""Files that a loss of power leaves whole: what is said to be there has come to the disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_READABLE = "rb" if os.name == "posix" else "rb+"  # Windows syncs only what may be written


def put(partial: Path, whole: Path) -> None:
    """Give a file its name; content and name are on the disk when this returns."""
    with partial.open(_READABLE) as file:
        os.fsync(file.fileno())
    partial.replace(whole)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(whole.parent, os.O_RDONLY)
        with suppress(OSError):  # some network drives sync no folder
            os.fsync(folder)
        os.close(folder)

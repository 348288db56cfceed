"""Files that stay as they were until what takes their place is whole: graphs, prompts, sheets of pictures."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from usoflow.errors import UsoflowError
from usoflow.settings import expanded


def write_whole(file: str | Path, data: bytes) -> None:
    """Write a file; one that is there is lost only when all is written.

    Raises:
        UsoflowError: `output_unwritable`.
    """
    try:
        path = Path(os.path.realpath(expanded(file)))  # a link stays one
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a terminal has no place beside it
            path.write_bytes(data)
        else:
            _write_beside(path, data)
    except OSError as reason:
        what = f"{file} cannot be written: {reason.strerror}."
        raise UsoflowError("output_unwritable", what) from None


def _write_beside(path: Path, data: bytes) -> None:
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(data)
        if os.path.exists(path):
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

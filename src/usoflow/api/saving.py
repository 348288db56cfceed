"""Files that stay as they were until what takes their place is whole: graphs, prompts, sheets, uploads."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from usoflow.durable import put
from usoflow.errors import UsoflowError
from usoflow.settings import expanded

_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.part")  # a UUID, as below


def save(file: str | Path, data: bytes) -> None:
    """Write what a user has named: a file, a link to one, or a pipe.

    Raises:
        UsoflowError: `output_unwritable`.
    """
    try:
        path = Path(os.path.realpath(expanded(file)))  # a link stays one
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a terminal has no place beside it
            path.write_bytes(data)
        else:
            write_whole(path, data)
    except OSError as reason:
        what = f"{file} cannot be written: {reason.strerror}."
        raise UsoflowError("output_unwritable", what) from None


def is_partial(path: Path) -> bool:
    """Whether this is what a `write_whole` that was interrupted has left."""
    return _PARTIAL.fullmatch(path.name) is not None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is never half there, and who may read one that was there still may."""
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        partial.write_bytes(data)
        if os.path.exists(path):
            shutil.copymode(path, partial)
        put(partial, path)
    finally:
        partial.unlink(missing_ok=True)

"""Names of files as workflows and clients tell them: what stays in its folder, what every system can tell."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from usoflow.errors import UsoflowError

LONGEST_PART = 240  # bytes: most systems take 255, of which _00001_.part has 12


def inside(name: str) -> PurePosixPath:
    r"""A name from a workflow as a path relative to some folder, with `/` or `\` between its parts.

    Raises:
        UsoflowError: `path_outside` for what leads out of the folder: `..`, absolute paths, NUL; on Windows
            for any colon: before one is a drive, after one a stream of the file.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    colon = os.name == "nt" and ":" in name
    if relative.is_absolute() or ".." in relative.parts or "\0" in name or colon:
        raise UsoflowError("path_outside", f"{name!r} is not a name inside a folder.")
    return relative


def check_prefix(prefix: str) -> None:
    """Whether pictures can be saved in a folder under names that begin so.

    Raises:
        UsoflowError: `path_outside`, `prompt_invalid` for what is too long.
    """
    if any(len(part.encode(errors="replace")) > LONGEST_PART for part in inside(prefix).parts):
        raise UsoflowError(
            "prompt_invalid",
            f"The name {prefix[:50]}... is longer than that of a file may be.",
            remedy=f"Let filename_prefix have at most {LONGEST_PART} bytes between two slashes.",
        )


def can_be_told(name: str) -> bool:
    r"""Whether the name of a file can be told.

    On Linux it may be bytes in another encoding, or have a `\`, which parts folders wherever it is told.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\\" not in name

"""A lock on an open file that the system gives back when the file is closed, however its process ends."""

from __future__ import annotations

import sys


def taken(descriptor: int) -> bool:
    """Whether the lock is ours now; False while somebody else has it.

    On POSIX whoever has the description open holds it, so a child that inherits the descriptor does too
    (flock(2)).

    Raises:
        OSError: the file system has no locks, as some in networks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter is Windows' word for it
        return False
    return True

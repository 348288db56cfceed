"""One server at a time for one jobs file: a lock that is held until the last process with it is gone."""

from __future__ import annotations

import os
import time
from pathlib import Path

from usoflow.errors import UsoflowError
from usoflow.file_lock import taken

PATIENCE = 10.0  # seconds that the worker of a killed server gets to notice and end
_PERIOD = 0.05


def hold(path: Path, *, patience: float = PATIENCE) -> int:
    """Take the lock.

    Returns:
        A file descriptor, which a worker inherits; on Windows the server alone holds the lock.

    Raises:
        UsoflowError: `state_in_use`, `state_unusable`.
    """
    descriptor = _opened(path)
    deadline = time.monotonic() + patience
    try:
        while not taken(descriptor):
            if time.monotonic() > deadline:
                raise UsoflowError("state_in_use", f"Another usoflow server uses {path.parent}.")
            time.sleep(_PERIOD)
    except OSError as error:  # some network file systems have no locks
        os.close(descriptor)
        what = f"{path.parent} cannot be locked: {error.strerror}."
        raise UsoflowError("state_unusable", what) from None
    except UsoflowError:
        os.close(descriptor)
        raise
    return descriptor


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        what = f"{path.parent} cannot be used as a folder: {error.strerror}."
        raise UsoflowError("state_unusable", what) from None

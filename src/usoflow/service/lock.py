"""One server at a time for one jobs file: a lock that is held until the last process with it is gone."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from usoflow.errors import UsoflowError
from usoflow.file_lock import taken

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that the worker of a killed server gets to notice and end
TELL_AFTER = 1.0  # seconds
_PERIOD = 0.05


def hold(path: Path, *, patience: float = PATIENCE) -> int:
    """Take the lock.

    Returns:
        A file descriptor, which a worker inherits; on Windows the server alone holds the lock.

    Raises:
        UsoflowError: `state_in_use`, `state_unusable`.
    """
    descriptor = _opened(path)
    begun, told = time.monotonic(), False
    try:
        while not taken(descriptor):
            waited = time.monotonic() - begun
            if waited > TELL_AFTER and not told:
                told = True
                logger.info(
                    "%s is in use: waiting up to %.0f s for its server to end.", path.parent, patience
                )
            if waited > patience:
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

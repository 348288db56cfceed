"""What usoflow and its worker log, kept for the editor's console panel."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

KEPT: Final = 1000  # lines
LONGEST: Final = 10_000  # characters of one: nodes print anything
LOGGER: Final = "usoflow"

Entry = dict[str, str]  # t: when (ISO 8601), m: what, with its line break


class LogBuffer(logging.Handler):
    """The last lines that were logged; `listen` is told each, from any thread."""

    def __init__(self, listen: Callable[[Entry], None]) -> None:
        super().__init__()
        self._entries: deque[Entry] = deque(maxlen=KEPT)
        self._listen = listen

    @property
    def entries(self) -> list[Entry]:
        """The oldest first."""
        return list(self._entries)

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat()
        text = self.format(record)
        entry = {"t": when, "m": f"{text if len(text) <= LONGEST else f'{text[:LONGEST]} …'}\n"}
        self._entries.append(entry)
        self._listen(entry)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hear what is logged meanwhile."""
        logger = logging.getLogger(LOGGER)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

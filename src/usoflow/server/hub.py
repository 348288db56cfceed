"""Who listens on `/ws`, and what waits to be sent to each: bounded, so that nobody delays anybody.

Progress, previews and the queue's length only matter in their newest form: a newer one replaces an older that
has not been sent. Lines of the log wait together as one message. Whoever lets too much else pile up is sent
nothing more and disconnected, and finds out by reconnecting.
Everything here happens in the event loop, but for `soon` and what uses it.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_WAITING: Final = 500  # messages for one client
MAX_BYTES: Final = 2**28  # of pictures in these
MAX_LINES: Final = 1000  # of the log in one of these
MAX_LOG_READERS: Final = 1000  # that are remembered
LONGEST_NAME: Final = 1000  # of a client

IMAGE: Final = 1
IMAGE_WITH_METADATA: Final = 4
FORMATS: Final[Mapping[str, int]] = {"image/jpeg": 1, "image/png": 2}

Key = tuple[str, ...]
LOGS: Final[Key] = ("logs",)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message; one with a `key` is replaced by a newer one of the same key."""

    type: str
    data: Mapping[str, Any]
    image: bytes = b""
    key: Key = ()

    def encoded(self, *, metadata: bool) -> str | bytes:
        """As it is sent to a client that understands (or not) pictures with metadata."""
        if not self.image:
            return json.dumps({"type": self.type, "data": self.data})
        if not metadata:
            return struct.pack(">II", IMAGE, FORMATS[self.data["image_type"]]) + self.image
        about = json.dumps(self.data).encode()
        return struct.pack(">II", IMAGE_WITH_METADATA, len(about)) + about + self.image


@dataclass(eq=False)
class Client:
    """One connection. `sid` is its name, which survives reconnecting."""

    sid: str
    metadata: bool = False
    overflowed: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: dict[Key, Outgoing] = field(default_factory=dict)
    _count: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, message: Outgoing) -> None:
        """Queue a message behind all others, also where it replaces an older one: order is that of events."""
        if self.overflowed.is_set():
            return
        self._count += 1
        key = message.key or (str(self._count),)
        self._waiting.pop(key, None)
        self._waiting[key] = message
        self._wake.set()
        size = sum(len(waiting.image) for waiting in self._waiting.values())
        if len(self._waiting) > MAX_WAITING or size > MAX_BYTES:
            self._waiting.clear()
            self.overflowed.set()

    def put_log(self, entry: Mapping[str, str]) -> None:
        """Queue a line of the log with those that still wait: of too many, the oldest are dropped."""
        waiting = self._waiting.get(LOGS)
        lines = [*waiting.data["entries"], entry] if waiting else [entry]
        self.put(Outgoing("logs", {"entries": lines[-MAX_LINES:]}, key=LOGS))

    async def next(self) -> Outgoing:
        """The next message, when there is one."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.pop(next(iter(self._waiting)))


class Hub:
    """All connections."""

    def __init__(self) -> None:
        self._clients: list[Client] = []
        self._log_readers: dict[str, None] = {}  # names of clients, who may be away
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._clients)

    def open(self) -> None:
        """Use the loop that runs now."""
        self._loop = asyncio.get_running_loop()

    def join(self, client: Client) -> None:
        """Send it what there is to be sent from now on."""
        self._clients.append(client)

    def leave(self, client: Client) -> None:
        """Send it nothing more."""
        if client in self._clients:
            self._clients.remove(client)

    def publish(self, message: Outgoing, to: str | None = None) -> None:
        """Send to the connections of one client, or to all (None)."""
        for client in self._clients:
            if to is None or client.sid == to:
                client.put(message)

    def soon(self, call: Callable[..., None], *values: Any) -> None:
        """Have the event loop call this, in the order in which it is asked to; from any thread."""
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *values)

    def publish_soon(self, message: Outgoing, to: str | None = None) -> None:
        """`publish`, from any thread."""
        self.soon(self.publish, message, to)

    def log_soon(self, entry: Mapping[str, str]) -> None:
        """A line of the log to those who want it; from any thread."""
        self.soon(self._log, entry)

    def _log(self, entry: Mapping[str, str]) -> None:
        for client in self._clients:
            if client.sid in self._log_readers:
                client.put_log(entry)

    def want_logs(self, sid: str, wanted: bool) -> None:
        """Send the log to a client's connections, those to come too, or no more."""
        self._log_readers.pop(sid, None)
        if wanted and len(sid) <= LONGEST_NAME:
            self._log_readers[sid] = None
        if len(self._log_readers) > MAX_LOG_READERS:
            self._log_readers.pop(next(iter(self._log_readers)))

    def status(self, remaining: int) -> None:
        """Tell all how many jobs wait or run; from any thread."""
        self.publish_soon(status_message(remaining))


def status_message(remaining: int, sid: str | None = None) -> Outgoing:
    """How many jobs wait or run; the first message of a connection also tells its name."""
    data: dict[str, Any] = {"status": {"exec_info": {"queue_remaining": remaining}}}
    if sid is not None:
        return Outgoing("status", {**data, "sid": sid})
    return Outgoing("status", data, key=("status",))

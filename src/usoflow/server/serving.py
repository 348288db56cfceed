"""The server process: listening comes first, the worker after it; and an end that loses nothing.

At SIGTERM (or Ctrl+C, or where its terminal is closed) the server is not ready at once, but answers until the
job in progress has finished or is pending again. A second signal does not wait for it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from usoflow.server.context import Server
from usoflow.server.picture import provide
from usoflow.service.supervisor import GRACE as GRACE_OF_JOBS

logger = logging.getLogger(__name__)

SOCKET_MESSAGE: Final = 2**16  # bytes that a client may send at once on /ws
KEEP_ALIVE: Final = 75  # seconds; who polls less often than a connection is kept would meet its end
GRACE: Final = 2  # seconds that open requests get at the end; the job in progress has had its own
HEAD: Final = 30  # seconds that the head of a request may take to come
BACKLOG: Final = 128  # connections that wait to be taken
FILES: Final = 65_536  # that may be open at once, if the system allows it: a connection is one
QUIET: Final = 60  # seconds between two complaints of one kind


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until a signal says to stop; that its terminal is gone is one, too."""
    _raise_limit()
    _end_with_terminal()
    config = uvicorn.Config(
        app,
        http=_Connection,
        backlog=BACKLOG,
        log_level="warning",
        access_log=False,
        ws_max_size=SOCKET_MESSAGE,
        ws_ping_timeout=None,  # scripts answer pings only while they read; who stalls is let go by the hub
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    _Server(config, app.state.server).run(sockets=[listening])


def _end_with_terminal() -> None:
    """That it is closed is as SIGTERM, but not under nohup. Only the main thread may say so."""
    hangup = getattr(signal, "SIGHUP", None)  # which Windows does not have
    if hangup is None or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(hangup) is signal.SIG_DFL:
        signal.signal(hangup, lambda *_: signal.raise_signal(signal.SIGTERM))


def _raise_limit() -> None:
    """As many open files as may be."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # macOS may take less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Connection(H11Protocol):
    """One that ends where no request comes, or half of one: no token is needed to open thousands."""

    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # it has asked
            self._stop_waiting()
        elif self._waits is None:
            self._waits = self.loop.call_later(HEAD, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None

    def _give_up(self) -> None:
        self._waits = None
        if self.transport.get_protocol() is self:  # else it has become a socket
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._complained = -float(QUIET)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and only then do what takes longer."""
        asyncio.get_running_loop().set_exception_handler(self._complain)
        await super().startup(sockets)
        threading.Thread(target=self._prepare, daemon=True).start()

    def _prepare(self) -> None:
        """Draw the example once; start the worker, whose libraries take a core and seconds to load."""
        try:
            provide(self._server.settings.examples)
        except OSError as error:  # a full disk, say
            logger.warning("The example picture cannot be written: %s.", error)
        self._server.engine.start()

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A line where no more files may be open: asyncio would tell it at each try, with a traceback."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif loop.time() - self._complained >= QUIET:
            self._complained = loop.time()
            logger.error("No further connection can be taken: %s.", error.strerror)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        supervisor = self._server.supervisor
        if supervisor.stopping:
            self._server.engine.stop()
        elif supervisor.running:
            told = "Stopping. The job in progress gets %.0f s to end; a second signal does not wait for it."
            logger.info(told, GRACE_OF_JOBS)
        supervisor.refuse()
        threading.Thread(target=self._drain, args=(sig, frame), daemon=True).start()

    def _drain(self, sig: int, frame: FrameType | None) -> None:
        self._server.supervisor.stop()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off now is no defect
        if not self.should_exit:  # a second time uvicorn would leave open what is to be closed
            super().handle_exit(sig, frame)

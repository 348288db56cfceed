"""The server process: listening comes first, the worker after it; and an end that loses nothing.

At SIGTERM (or Ctrl+C) the server is not ready at once, but answers until the job in progress has finished or
is pending again. A second signal does not wait for it.
"""

from __future__ import annotations

import logging
import socket
import threading
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from usoflow.server.context import Server
from usoflow.server.picture import provide

logger = logging.getLogger(__name__)

SOCKET_MESSAGE: Final = 2**16  # bytes that a client may send at once on /ws
KEEP_ALIVE: Final = 75  # seconds; who polls less often than a connection is kept would meet its end
GRACE: Final = 2  # seconds that open requests get at the end; the job in progress has had its own


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until a signal says to stop."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws_max_size=SOCKET_MESSAGE,
        ws_ping_timeout=None,  # scripts answer pings only while they read; who stalls is let go by the hub
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    _Server(config, app.state.server).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and only then do what takes longer."""
        await super().startup(sockets)
        threading.Thread(target=self._prepare, daemon=True).start()

    def _prepare(self) -> None:
        """Draw the example once; start the worker, whose libraries take a core and seconds to load."""
        try:
            provide(self._server.settings.examples)
        except OSError as error:  # a full disk, say
            logger.warning("The example picture cannot be written: %s.", error)
        self._server.engine.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        supervisor = self._server.supervisor
        if supervisor.stopping:
            self._server.engine.stop()
        supervisor.refuse()
        threading.Thread(target=self._drain, args=(sig, frame), daemon=True).start()

    def _drain(self, sig: int, frame: FrameType | None) -> None:
        self._server.supervisor.stop()
        if not self.should_exit:  # a second time uvicorn would leave open what is to be closed
            super().handle_exit(sig, frame)

"""`/ws`: one connection of a client, from greeting to end."""

from __future__ import annotations

import json
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

from anyio import CancelScope, create_task_group, move_on_after
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from starlette.concurrency import run_in_threadpool

from usoflow.server.context import Server, ServerOf
from usoflow.server.hub import LONGEST_NAME, Client, Outgoing, status_message
from usoflow.server.messages import executing, execution_start, progress_state
from usoflow.server.routes.system import features

router = APIRouter()

TOO_SLOW: Final = 1013  # "try again later": the client reconnects
CLOSING: Final = 2.0  # seconds to tell that to a client that may not read at all


@router.websocket("/ws")
async def socket(websocket: WebSocket, server: ServerOf) -> None:
    """Send what happens until the client leaves, or reads too slowly to be of use."""
    await websocket.accept()
    client = Client(_name(websocket.query_params.get("clientId", "")))

    def join(waiting: int) -> None:
        _greet(server, client, waiting)
        server.hub.join(client)

    try:
        await run_in_threadpool(server.counted, join)
        async with create_task_group() as tasks:
            for part in (_send(websocket, client), _receive(websocket, client, server), _overflow(client)):
                tasks.start_soon(_first_to_end, part, tasks.cancel_scope)
    finally:
        server.hub.leave(client)
    if client.overflowed.is_set():
        with suppress(WebSocketDisconnect, RuntimeError), move_on_after(CLOSING):
            await websocket.close(TOO_SLOW)


async def _first_to_end(part: Coroutine[Any, Any, None], connection: CancelScope) -> None:
    """A connection ends with the first of its parts, also while another waits for the client to read."""
    await part
    connection.cancel()


def _name(wanted: str) -> str:
    """The name that a client had before, or a new one."""
    return wanted if 0 < len(wanted) <= LONGEST_NAME else uuid.uuid4().hex


def _greet(server: Server, client: Client, waiting: int) -> None:
    """The queue, and where the client's own job is if it comes back in the middle of it."""
    client.put(status_message(waiting, client.sid))
    running = server.supervisor.running
    if running and running.job.client == client.sid:
        client.put(execution_start(running.job))
        client.put(progress_state(running))
        if running.node:
            client.put(executing(running.job, running.node))


async def _send(websocket: WebSocket, client: Client) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):  # RuntimeError: the client has closed it
        while True:
            encoded = (await client.next()).encoded(metadata=client.metadata)
            await (
                websocket.send_bytes(encoded) if isinstance(encoded, bytes) else websocket.send_text(encoded)
            )


async def _overflow(client: Client) -> None:
    await client.overflowed.wait()


async def _receive(websocket: WebSocket, client: Client, server: Server) -> None:
    """Clients say one thing: what they understand."""
    with suppress(WebSocketDisconnect):
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            announced = _flags(message.get("text"))
            if announced is not None:
                client.metadata = announced.get("supports_preview_metadata") is True
                client.put(Outgoing("feature_flags", features(server)))


def _flags(text: str | None) -> dict[str, Any] | None:
    """What a client announces, if this is an announcement."""
    try:
        message = json.loads(text or "")
        data = message["data"] if message["type"] == "feature_flags" else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return data if isinstance(data, dict) else None

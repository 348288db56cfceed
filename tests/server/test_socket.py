"""`/ws`: ComfyUI's messages in ComfyUI's order; slow clients; coming back."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket as stdlib_socket
import struct
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from starlette.testclient import WebSocketTestSession

from e2e import real_server
from server.conftest import ADDRESS, JPEG, SOCKET, Actor, application, ended, settings_of, submit, until
from usoflow.server.app import create_app
from usoflow.server.hub import (
    LONGEST_NAME,
    MAX_BYTES,
    MAX_LINES,
    MAX_LOG_READERS,
    MAX_WAITING,
    Client,
    Hub,
    Outgoing,
    status_message,
)
from usoflow.server.log import LONGEST, LogBuffer
from usoflow.server.messages import messages_of
from usoflow.service.engine import Progress
from usoflow.service.jobs import Request
from usoflow.service.store import JobStore
from usoflow.service.supervisor import Running

FLAGS = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}


def received(socket: WebSocketTestSession, last: tuple[str, object]) -> list[Any]:
    """Messages (JSON objects or bytes) until one of this type with this value of `node`."""
    found: list[Any] = []
    while True:
        message = socket.receive()
        found.append(json.loads(message["text"]) if message.get("text") else message["bytes"])
        latest = found[-1]
        if isinstance(latest, dict) and (latest["type"], latest["data"].get("node")) == last:
            return found


def test_one_job(client: TestClient) -> None:
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:
        greeting = socket.receive_json()
        assert greeting["data"] == {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "me"}
        socket.send_json(FLAGS)
        assert socket.receive_json()["data"]["supports_preview_metadata"] is True
        job = submit(client, client_id="me")
        messages = received(socket, ("executing", None))
    kinds = [message["type"] if isinstance(message, dict) else "preview" for message in messages]
    newest_only = {"status", "progress", "progress_state"}  # how many of these come depends on the client
    assert [kind for kind in kinds if kind not in newest_only] == [
        "execution_start", "execution_cached", "executing", "preview", "executing", "executed",
        "execution_success", "executing",
    ]  # fmt: skip
    assert newest_only <= set(kinds)
    by_kind = {m["type"]: m["data"] for m in messages if isinstance(m, dict)}
    assert by_kind["execution_cached"]["nodes"] == ["loader"]
    assert by_kind["executed"]["output"]["images"][0]["filename"] == "good_00001_.png"
    assert {m["data"]["prompt_id"] for m in messages if isinstance(m, dict) and m["type"] != "status"} == {
        job
    }
    assert by_kind["progress_state"]["nodes"]["sampler"] == {
        "value": 2, "max": 2, "state": "finished", "node_id": "sampler", "prompt_id": job,
        "display_node_id": "sampler", "parent_node_id": None, "real_node_id": "sampler",
    }  # fmt: skip
    (preview,) = (message for message in messages if isinstance(message, bytes))
    event, length = struct.unpack(">II", preview[:8])
    about = json.loads(preview[8 : 8 + length])
    assert (event, about["node_id"], about["prompt_id"], about["image_type"]) == (
        4,
        "sampler",
        job,
        "image/jpeg",
    )
    assert preview[8 + length :] == JPEG


def test_a_client_that_announces_nothing_gets_plain_previews(client: TestClient) -> None:
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:
        submit(client, client_id="me")
        messages = received(socket, ("executing", None))
    (preview,) = (message for message in messages if isinstance(message, bytes))
    assert preview == struct.pack(">II", 1, 1) + JPEG


def test_a_failure_is_told_at_its_node(client: TestClient) -> None:
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:
        submit(client, "bad", client_id="me")
        messages = received(socket, ("executing", None))
    (error,) = (m["data"] for m in messages if isinstance(m, dict) and m["type"] == "execution_error")
    assert (error["node_id"], error["exception_type"]) == ("sampler", "out_of_memory")
    assert isinstance(error["traceback"], list)


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("good", "execution_success"), ("bad", "execution_error"), ("long", "execution_interrupted")],
)
def test_how_a_job_ended_is_told_before_that_the_queue_is_shorter(
    client: TestClient, prefix: str, kind: str
) -> None:
    first = submit(client, "long")  # so that nothing else changes the queue while the job of the test runs
    until(client, first, ("in_progress",))
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:
        job = submit(client, prefix, client_id="me")
        client.post("/interrupt", json={"prompt_id": first})
        if prefix == "long":
            until(client, job, ("in_progress",))
            client.post("/interrupt", json={"prompt_id": job})
        messages = [m for m in received(socket, ("executing", None)) if isinstance(m, dict)]
    assert [message["type"] for message in messages[-3:]] == [kind, "status", "executing"]
    assert messages[-2]["data"]["status"]["exec_info"]["queue_remaining"] == 0


def test_others_hear_only_of_the_queue(client: TestClient) -> None:
    with client.websocket_connect(f"{SOCKET}?clientId=other") as socket:
        socket.receive_json()
        ended(client, submit(client, client_id="me"))
        client.post("/queue", json={"delete": []})  # one more status
        assert socket.receive_json()["type"] == "status"
        assert socket.receive_json()["type"] == "status"


def test_who_comes_back_learns_where_the_job_is(client: TestClient) -> None:
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:
        job = submit(client, "long", client_id="me")
        received(socket, ("progress", "sampler"))
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:
        messages = received(socket, ("executing", "sampler"))
        assert [m["type"] for m in messages] == ["status", "execution_start", "progress_state", "executing"]
        assert messages[0]["data"]["status"]["exec_info"]["queue_remaining"] == 1
        client.post("/interrupt")
        kinds = [m["type"] for m in received(socket, ("executing", None)) if isinstance(m, dict)]
        assert "execution_interrupted" in kinds
    assert until(client, job, ("cancelled",))


@pytest.mark.parametrize("name", ["bot@host", "my app", "{7c1e}", "x" * LONGEST_NAME])
def test_a_client_is_called_as_it_likes(client: TestClient, name: str) -> None:
    with client.websocket_connect(f"{SOCKET}?{urlencode({'clientId': name})}") as socket:
        submit(client, "good", client_id=name)
        received(socket, ("executing", None))


def test_what_clients_say_is_taken_or_left(client: TestClient) -> None:
    with client.websocket_connect(SOCKET) as socket:
        assert len(socket.receive_json()["data"]["sid"]) == 32
        for text in (
            "",
            "[]",
            "{",
            "5",
            '{"type": "feature_flags", "data": 5}',
            '{"type": "x"}',
            "[" * 100_000,
        ):
            socket.send_text(text)
        socket.send_bytes(b"\xff")
        socket.send_json(FLAGS)
        assert socket.receive_json()["type"] == "feature_flags"


def test_a_stalled_client_costs_bounded_memory_and_is_let_go() -> None:
    """Progress replaces older progress; what cannot be replaced ends the connection."""

    async def play() -> None:
        hub, stalled, other = Hub(), Client("a"), Client("b")
        hub.join(stalled)
        hub.join(other)
        for number in range(100_000):
            hub.publish(Outgoing("progress", {"value": number}, key=("progress", "job")), "a")
        hub.publish(status_message(1))
        hub.publish(status_message(2))
        assert len(stalled._waiting) == 2
        first, second = await stalled.next(), await stalled.next()
        assert first is not None
        assert second is not None
        assert (first.data["value"], second.data["status"]["exec_info"]["queue_remaining"]) == (99_999, 2)
        hub.publish(Outgoing("progress", {"value": 1}, key=("progress", "job")), "a")
        hub.publish(Outgoing("executing", {"node": "2"}), "a")
        hub.publish(Outgoing("progress", {"value": 2}, key=("progress", "job")), "a")
        in_order = [await stalled.next(), await stalled.next()]
        assert [message.type for message in in_order if message] == ["executing", "progress"]
        for number in range(2 * MAX_WAITING):
            hub.publish(Outgoing("executed", {"node": str(number)}), "a")
        assert stalled.overflowed.is_set()
        assert not stalled._waiting
        assert (await other.next()).type == "status"
        assert not other.overflowed.is_set()
        hub.leave(stalled)
        assert len(hub) == 1

    asyncio.run(play())


def test_pictures_that_wait_are_bounded_too() -> None:
    async def play() -> None:
        client, large = Client("a"), bytes(MAX_BYTES // 4)
        for number in range(4):
            client.put(Outgoing("result", {"n": number}, large))
        assert not client.overflowed.is_set()
        assert (await client.next()).data == {"n": 0}
        client.put(Outgoing("preview", {"n": 4}, large, key=("preview",)))
        client.put(Outgoing("preview", {"n": 5}, large, key=("preview",)))  # in its place
        assert not client.overflowed.is_set()
        client.put(Outgoing("result", {"n": 6}, large))
        assert client.overflowed.is_set()

    asyncio.run(play())


def test_a_line_of_the_log_is_not_kept_at_any_length() -> None:
    told: list[dict[str, str]] = []
    log = LogBuffer(told.append)
    log.emit(logging.LogRecord("usoflow", logging.INFO, "", 0, "x" * 1_000_000, (), None))
    assert [len(entry["m"]) for entry in told] == [LONGEST + len(" …\n")]


def test_a_flood_of_the_log_lets_nobody_go() -> None:
    """A custom node prints; of what waits the oldest lines are dropped."""

    async def play() -> None:
        hub, client = Hub(), Client("a")
        hub.open()
        hub.want_logs("a", True)
        hub.join(client)
        for number in range(3 * MAX_LINES):
            hub.log_soon({"t": "", "m": str(number)})
        await asyncio.sleep(0)
        assert not client.overflowed.is_set()
        hub.publish(Outgoing("executing", {"node": "2"}), "a")
        lines = [entry["m"] for entry in (await client.next()).data["entries"]]
        assert lines == [str(number) for number in range(2 * MAX_LINES, 3 * MAX_LINES)]
        assert (await client.next()).type == "executing"

    asyncio.run(play())


def test_who_wants_the_log_is_remembered_within_bounds() -> None:
    hub, first, last = Hub(), Client("0"), Client(str(MAX_LOG_READERS))
    for number in range(MAX_LOG_READERS + 1):
        hub.want_logs(str(number), True)
    hub.want_logs("x" * (LONGEST_NAME + 1), True)
    assert len(hub._log_readers) == MAX_LOG_READERS
    for client in (first, last):
        hub.join(client)
    hub._log({"t": "", "m": "now"})
    assert (len(first._waiting), len(last._waiting)) == (0, 1)


def test_pictures_that_are_results_replace_nothing(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    running = Running(store.add(Request(id="job", prompt={}, targets=(), extra={}), limit=1))
    store.close()
    client = Client("a")
    for number in (1, 2, 3):
        for message in messages_of(running, Progress("9", number, 3, b"jpeg", b"png %d" % number)):
            client.put(message)
    waiting = [message.encoded(metadata=False) for message in client._waiting.values()]
    frames = [message for message in waiting if isinstance(message, bytes)]
    results = [struct.pack(">II", 1, 2) + b"png %d" % number for number in (1, 2, 3)]
    assert [frame for frame in frames if frame in results] == results
    assert [frame for frame in frames if frame not in results] == [struct.pack(">II", 1, 1) + b"jpeg"]


def test_pictures_come_over_the_socket_alone(place: Path, small_models: Path) -> None:
    """From a real worker, collected as ComfyUI's published example does; again when nothing has changed."""
    prompt = {
        "picture": {
            "class_type": "EmptyImage",
            "inputs": {"width": 8, "height": 6, "batch_size": 3, "color": 0xFF8000},
        },
        "size": {"class_type": "GetImageSize", "inputs": {"image": ["picture", 0]}},
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["size", 0]}},
        "send": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["picture", 0]}},
    }
    app = create_app(settings_of(small_models, place), device="cpu")
    with (
        TestClient(app, base_url=ADDRESS) as client,
        client.websocket_connect(f"{SOCKET}?clientId=me") as socket,
    ):
        for _ in range(2):
            body = {"prompt": prompt, "client_id": "me"}
            job = client.post("/prompt", json=body).json()["prompt_id"]
            messages = received(socket, ("executing", None))
            current, frames = None, []
            for message in messages:
                if isinstance(message, dict):
                    current = message["data"]["node"] if message["type"] == "executing" else current
                elif current == "send":
                    frames.append(message)
            assert [frame[:8] for frame in frames] == [struct.pack(">II", 1, 2)] * 3
            with Image.open(io.BytesIO(frames[-1][8:])) as picture:
                assert (picture.format, picture.size) == ("PNG", (8, 6))
                assert picture.getpixel((0, 0)) == (255, 128, 0)
            executed = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "executed"]
            assert [(data["node"], data["output"]) for data in executed] == [("text", {"text": ["8"]})]
            entry = client.get(f"/history/{job}").json()[job]
            assert entry["outputs"] == {"text": {"text": ["8"]}}
        cached = dict(entry["status"]["messages"])["execution_cached"]["nodes"]
        assert set(cached) == {"picture", "size", "text"}
    assert list((place / "output").iterdir()) == []


def test_who_never_reads_is_let_go_while_a_send_waits(place: Path, small_models: Path) -> None:
    """A real socket, whose buffers are full: no message of the server will ever arrive."""
    app = application(settings_of(small_models, place), Actor())
    hub: Hub = app.state.server.hub
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        real_server.until(lambda: running.started)
        port = running.servers[0].sockets[0].getsockname()[1]
        with stdlib_socket.create_connection(("127.0.0.1", port)) as deaf:
            deaf.sendall(
                f"GET /ws?clientId=deaf HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
            )
            real_server.until(lambda: len(hub) == 1)
            text = "x" * 100_000
            for number in range(2 * MAX_WAITING):
                hub.publish_soon(Outgoing("executed", {"node": str(number), "text": text}), "deaf")
            real_server.until(lambda: len(hub) == 0)
    finally:
        running.should_exit = True
        thread.join()


def test_the_log_goes_to_who_wants_it(client: TestClient) -> None:
    logger = logging.getLogger("usoflow.test")
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:
        socket.receive_json()
        logger.warning("before %s", 1)
        body = {"enabled": True, "clientId": "me"}
        assert client.patch("/internal/logs/subscribe", json=body).status_code == 200
        logger.warning("now\n%s", 2)
        message = socket.receive_json()
        assert (message["type"], message["data"]["entries"][0]["m"]) == ("logs", "now\n2\n")
    with client.websocket_connect(f"{SOCKET}?clientId=me") as socket:  # it has not asked again
        socket.receive_json()
        logger.warning("back")
        assert socket.receive_json()["data"]["entries"][0]["m"] == "back\n"
        client.patch("/internal/logs/subscribe", json=body | {"enabled": False})
        logger.warning("after")
        client.post("/queue", json={"delete": []})
        assert socket.receive_json()["type"] == "status"
    entries = client.get("/internal/logs/raw").json()["entries"]
    assert [entry["m"] for entry in entries] == ["before 1\n", "now\n2\n", "back\n", "after\n"]
    assert client.get("/internal/logs").json() == "before 1\nnow\n2\nback\nafter\n"

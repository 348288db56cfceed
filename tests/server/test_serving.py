"""The application on a real socket, and its beginning and end."""

from __future__ import annotations

import asyncio
import errno
import functools
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from e2e.real_server import until
from server.conftest import ADDRESS, Actor, application, settings_of
from usoflow.errors import UsoflowError
from usoflow.server import app as app_module
from usoflow.server import serving
from usoflow.server.app import create_app
from usoflow.server.routes import system

HURRY = 0.3  # seconds, for what uvicorn would otherwise wait for longer than a test may
UPGRADE = (
    "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@contextmanager
def served(app: FastAPI, monkeypatch: pytest.MonkeyPatch, **defaults: Any) -> Iterator[socket.socket]:
    """A connection to an application, where uvicorn has these defaults."""
    running: list[uvicorn.Server] = []

    class Kept(serving._Server):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            running.append(self)

    monkeypatch.setattr(serving, "_Server", Kept)
    monkeypatch.setattr(uvicorn, "Config", functools.partial(uvicorn.Config, **defaults))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serving.serve, args=(app, listening))
        thread.start()
        try:
            with socket.create_connection(listening.getsockname()) as connection:
                connection.settimeout(10)
                yield connection
        finally:
            running[0].should_exit = True
            thread.join()


def test_a_script_that_does_not_read_its_socket_for_a_while_keeps_it(
    place: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = application(settings_of(small_models, place), Actor())
    hub = app.state.server.hub
    with served(app, monkeypatch, ws_ping_interval=HURRY, ws_ping_timeout=HURRY) as connection:
        connection.sendall(UPGRADE.encode())
        until(lambda: len(hub) == 1)
        time.sleep(4 * HURRY)
        assert len(hub) == 1
        assert b"\x89" in connection.recv(10_000)  # a ping, which keeps routers from forgetting it


def test_a_connection_that_is_not_used_for_a_while_is_kept(
    place: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = application(settings_of(small_models, place), Actor())
    with served(app, monkeypatch, timeout_keep_alive=HURRY) as connection:
        client = HTTPConnection("localhost")
        client.sock = connection
        for _ in range(2):
            client.request("GET", "/queue")
            assert client.getresponse().read()
            time.sleep(4 * HURRY)
        assert client.sock is connection  # and not another one


@pytest.mark.parametrize("begun", [b"", b"GET /queue HTT"])
@pytest.mark.parametrize("asked_before", [False, True])
def test_who_opens_a_connection_and_asks_nothing_is_let_go(
    place: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes, asked_before: bool
) -> None:
    """Each takes one of the files that may be open."""
    monkeypatch.setattr(serving, "HEAD", HURRY)
    monkeypatch.setattr(serving, "KEEP_ALIVE", 2 * HURRY)
    with served(application(settings_of(small_models, place), Actor()), monkeypatch) as connection:
        if asked_before:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answered = b""
            while not answered.endswith(b"}"):
                answered += connection.recv(10_000)
        begin = time.monotonic()
        connection.sendall(begun)
        assert connection.recv(10_000) == b""
        assert time.monotonic() - begin > HURRY / 2


def test_a_socket_and_a_long_answer_are_not_let_go(
    place: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD", HURRY)
    monkeypatch.setattr(system, "PATIENCE", 4 * HURRY)
    app = application(settings_of(small_models, place), Unknown())
    with served(app, monkeypatch) as connection:
        connection.sendall(UPGRADE.encode())
        until(lambda: len(app.state.server.hub) == 1)
        with socket.create_connection(connection.getpeername(), timeout=10) as other:
            other.sendall(b"GET /system_stats HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in other.recv(10_000)
        assert len(app.state.server.hub) == 1


def test_where_no_more_files_may_be_open_that_is_told_once(
    place: Path, small_models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = application(settings_of(small_models, place), Actor()).state.server
    found = serving._Server(uvicorn.Config(FastAPI()), server)
    loop = asyncio.new_event_loop()
    try:
        for _ in range(100):
            full = OSError(errno.EMFILE, "Too many open files")
            found._complain(loop, {"message": "socket.accept() out of system resource", "exception": full})
        assert caplog.messages == ["No further connection can be taken: Too many open files."]
        found._complain(loop, {"message": "a defect"})
        assert "a defect" in caplog.messages
    finally:
        loop.close()
        server.store.close()


def test_one_process_may_have_one_application_after_another(place: Path, small_models: Path) -> None:
    settings = settings_of(small_models, place)
    for _ in range(2):
        with TestClient(create_app(settings, device="cpu"), base_url=ADDRESS) as client:
            assert client.get("/queue").status_code == 200
            with pytest.raises(UsoflowError) as caught, patience(0.1):
                create_app(settings)
            assert caught.value.code == "state_in_use"


def test_an_application_that_cannot_begin_keeps_nobody_out(place: Path, small_models: Path) -> None:
    settings = settings_of(small_models, place)
    settings.state.mkdir()
    settings.jobs_file.write_bytes(b"no database" * 1000)
    for _ in range(2):
        with pytest.raises(UsoflowError) as caught, patience(0.1):
            create_app(settings)
        assert caught.value.code == "state_unusable"


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """How long is waited for a lock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "hold", functools.partial(app_module.hold, patience=seconds))
        yield


class Late(Actor):
    """An engine that knows its device only a while after it was started."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0.0

    def start(self) -> None:
        self.started = self.started or time.monotonic()

    def system(self) -> Mapping[str, Any]:
        known = self.started and time.monotonic() > self.started + HURRY
        device = {"name": "cuda:0", "type": "cuda", "index": 0, "vram_total": 7, "vram_free": 5}
        return device if known else {}


def test_the_device_is_described_as_soon_as_it_is_known(place: Path, small_models: Path) -> None:
    """A client that decides by the memory it finds would else decide by that of the machine."""
    with TestClient(application(settings_of(small_models, place), Late()), base_url=ADDRESS) as client:
        (device,) = client.get("/system_stats").json()["devices"]
    assert (device["name"], device["vram_total"], device["torch_vram_free"]) == ("cuda:0", 7, 5)


def test_who_asks_for_a_device_that_does_not_start_does_not_wait(place: Path, small_models: Path) -> None:
    engine = Late()
    engine.broken = "The worker does not start."
    with TestClient(application(settings_of(small_models, place), engine), base_url=ADDRESS) as client:
        assert client.get("/system_stats").elapsed.total_seconds() < 5
    assert not engine.started


class Unknown(Actor):
    """An engine that says nothing of its device until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.device: dict[str, Any] = {}

    def system(self) -> Mapping[str, Any]:
        return self.device


def test_who_waits_for_the_device_keeps_nobody_else_waiting(place: Path, small_models: Path) -> None:
    """There may be many of them, and the server has few threads."""
    engine = Unknown()
    app = application(settings_of(small_models, place), engine)
    with TestClient(app, base_url=ADDRESS) as client, ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(client.get, "/system_stats") for _ in range(60)]
        time.sleep(4 * HURRY)
        begin = time.monotonic()
        assert client.get("/queue").status_code == 200
        took = time.monotonic() - begin
        assert not any(answer.done() for answer in waiting)
        engine.device = {"name": "cuda:0", "type": "cuda", "index": 0}
        names = {answer.result().json()["devices"][0]["name"] for answer in waiting}
    assert names == {"cuda:0"}
    assert took < system.PATIENCE / 2


def test_without_room_for_the_example_the_worker_starts_all_the_same(
    place: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(serving, "provide", full)
    engine = Late()
    server = application(settings_of(small_models, place), engine).state.server
    serving._Server(uvicorn.Config(FastAPI()), server)._prepare()
    server.store.close()
    assert engine.started
    assert "No space left on device" in caplog.text

"""A server with an engine that plays a part, and a client of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from small import text_to_image
from usoflow.nodes.context import SavedImage, Shown
from usoflow.schema.specs import NodeSchema
from usoflow.server.app import assemble
from usoflow.server.context import Limits, ServerSettings
from usoflow.service.engine import (
    Cached,
    Cancelled,
    Done,
    Failed,
    Finished,
    Outcome,
    Progress,
    Report,
    Run,
    Started,
)
from usoflow.service.store import JobStore
from usoflow.settings import find_folders

ADDRESS = "http://127.0.0.1:8188"
SOCKET = "ws://127.0.0.1:8188/ws"
JPEG = b"\xff\xd8\xff\xe0preview"


class Actor:
    """An engine: each job is sampled in two steps and saved; its prefix says how it ends."""

    def __init__(self) -> None:
        self.cancelled: set[str] = set()
        self.freed: list[bool] = []
        self.broken = ""

    def run(self, run: Run, listen: Callable[[Report], None]) -> Outcome:
        prefix = run.prompt["save"]["inputs"]["filename_prefix"]
        listen(Cached(("loader",)))
        listen(Started("sampler", "KSampler"))
        listen(Progress("sampler", 1, 2, JPEG))
        deadline = time.monotonic() + 20
        while prefix == "long" and run.job not in self.cancelled and time.monotonic() < deadline:
            time.sleep(0.005)
        if run.job in self.cancelled:
            return Cancelled()
        if prefix == "bad":
            return Failed("out_of_memory", "what", "remedy", "sampler", "KSampler")
        listen(Progress("sampler", 2, 2))
        listen(Finished("sampler", 0.1, 1, None))
        listen(Started("save", "SaveImage"))
        listen(Finished("save", 0.1, 1, shown(f"{prefix}_00001_.png")))
        return Done()

    def cancel(self, job: str) -> None:
        self.cancelled.add(job)

    def free(self, *, outputs: bool) -> None:
        self.freed.append(outputs)

    def system(self) -> Mapping[str, Any]:
        return {"name": "cpu", "type": "cpu", "index": None, "pytorch_version": "2"}

    def fault(self) -> str:
        return self.broken

    def start(self) -> None:
        pass

    def nodes(self) -> Sequence[NodeSchema]:
        return ()

    def stop(self) -> None:
        pass


def shown(name: str) -> dict[str, Any]:
    """A picture in the output folder, as an output node tells of it."""
    return Shown((SavedImage(name, "", "output"),)).record()


Serve = Callable[..., TestClient]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with state, input and output."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def serve(small_models: Path, place: Path) -> Iterator[Serve]:
    """Start a server with these settings."""
    clients: list[TestClient] = []

    def start(*, limits: Limits | None = None, **more: Any) -> TestClient:
        settings = settings_of(small_models, place, limits=limits or Limits(), **more)
        client = TestClient(application(settings, Actor()), base_url=ADDRESS)
        client.__enter__()
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def settings_of(models: Path, place: Path, **more: Any) -> ServerSettings:
    """Of a server over the folders of `place`, without the editor."""
    folders = find_folders(models=models, inputs=place / "input", output=place / "output")
    return ServerSettings(**{"folders": folders, "state": place / "state", "ui": False} | more)


def application(settings: ServerSettings, engine: Actor) -> FastAPI:
    """An application with a store in the folder of the state."""
    return assemble(settings, JobStore(settings.jobs_file), engine)


@pytest.fixture
def client(serve: Serve) -> TestClient:
    """A client of a server with the usual settings."""
    return serve()


def prompt(prefix: str = "good") -> dict[str, Any]:
    """A prompt that ends as its prefix says: good, bad, long."""
    found = text_to_image()
    found["save"]["inputs"]["filename_prefix"] = prefix
    return found


def submit(client: TestClient, prefix: str = "good", **more: Any) -> str:
    """Send a prompt; returns the id of the job."""
    answer = client.post("/prompt", json={"prompt": prompt(prefix), **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt_id"])


def ended(client: TestClient, job: str) -> dict[str, Any]:
    """A job when it is over."""
    return until(client, job, ("completed", "failed", "cancelled"))


def until(client: TestClient, job: str, states: tuple[str, ...]) -> dict[str, Any]:
    """A job when it is in one of these states."""
    deadline = time.monotonic() + 20
    while (found := client.get(f"/api/jobs/{job}").json())["status"] not in states:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return dict(found)

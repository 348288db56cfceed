"""Real processes, killed at random moments: no accepted job is lost, none is done twice, states are right."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from e2e.real_server import RealServer, until
from small import text_to_image, with_inputs
from usoflow.service.store import MAX_ATTEMPTS
from usoflow.service.supervisor import GRACE


@pytest.fixture
def server(small_models: Path, tmp_path: Path) -> Iterator[RealServer]:
    """A server that has not been started."""
    (tmp_path / "input").mkdir()
    found = RealServer(small_models, tmp_path, options=("--no-ui",))
    yield found
    found.kill()


def prompt(number: int, steps: int = 1) -> dict[str, Any]:
    """A job unlike every other."""
    return with_inputs(text_to_image(), "sampler", seed=number, steps=steps)


def submit_at_last(server: RealServer, number: int, steps: int = 1) -> None:
    """Send a job again and again, under one id, until the server says that it has it."""

    def accepted() -> bool:
        body = {"prompt": prompt(number, steps), "prompt_id": f"job-{number}"}
        try:
            return httpx.post(f"{server.url}/prompt", json=body, timeout=30).status_code in (200, 409)
        except httpx.HTTPError:
            return False

    until(accepted)


def check(server: RealServer, jobs: int, killer: Killer) -> None:
    """Every job is final, none failed without a reason; pictures and outputs are the same set."""
    until(lambda: server.get("/prompt")["exec_info"]["queue_remaining"] == 0, 300)
    listed = server.get("/jobs?limit=1000")["jobs"]
    assert sorted(job["id"] for job in listed) == sorted(f"job-{number}" for number in range(jobs))
    states = Counter(job["status"] for job in listed)
    assert set(states) <= {"completed", "failed"}
    errors = {job["id"]: job["execution_error"] for job in listed if job["status"] == "failed"}
    assert {error["exception_type"] for error in errors.values()} <= {"worker_died", "out_of_memory"}
    given_up = {job for job, error in errors.items() if "server itself" in error["exception_message"]}
    assert all(killer.deaths[job] >= MAX_ATTEMPTS for job in given_up)
    assert len(errors) - len(given_up) <= killer.worker_kills
    shown = [
        image["filename"]
        for job in listed
        for output in server.get(f"/jobs/{job['id']}")["outputs"].values()
        for image in output["images"]
    ]
    assert len(shown) == len(set(shown)) >= states["completed"]
    files = {path.name for path in (server.place / "output").iterdir()}
    assert files == set(shown)
    for name in files:
        Image.open(server.place / "output" / name).load()


def state_at_death(server: RealServer) -> tuple[str, str] | None:
    """Id and outputs of the job that was in progress when the server was killed."""
    with contextlib.closing(sqlite3.connect(server.place / "state" / "jobs.sqlite")) as connection:
        query = "SELECT id, outputs FROM jobs WHERE state = 'in_progress'"
        found: tuple[str, str] | None = connection.execute(query).fetchone()
    return found


@dataclass
class Killer:
    """Kills server or worker at moments of a kind, and counts what was hit."""

    server: RealServer
    chance: random.Random
    worker_kills: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)  # of the server, while a job was in progress

    def strike(self, moment: str, number: int) -> None:
        """Submit a job and kill at this moment of its life; then everything is started again."""
        before = self._files()
        submit_at_last(self.server, number, steps=60 if moment == "sampling" else 1)
        if moment == "sampling":
            job = f"job-{number}"
            until(lambda: self.server.get(f"/jobs/{job}")["status"] != "pending", 300)
            time.sleep(self.chance.uniform(0, 0.1))
        elif moment == "renamed":  # the picture has its name, but the table does not know of it
            until(lambda: self._files() - before, 300, period=0)
        else:
            time.sleep(self.chance.uniform(0, 3))
        if moment == "any" and self.chance.random() < 0.6:
            self.worker_kills += self.server.kill_worker()
            return
        self._kill_server(moment, before)
        if moment == "start":
            self.server.start(wait=False)
            time.sleep(self.chance.uniform(0, 2))
            self._kill_server(moment, before)
            self.hits["start"] += 1
        self.server.start(wait=False)

    def _kill_server(self, moment: str, before: set[str]) -> None:
        self.server.kill()
        dying = state_at_death(self.server)
        if dying is None:
            return
        self.deaths[dying[0]] += 1
        if moment == "sampling":
            self.hits["sampling"] += 1
        elif dying[1] == "{}" and self._files() - before:
            self.hits["renamed"] += 1

    def _files(self) -> set[str]:
        folder = self.server.place / "output"
        return {name for name in os.listdir(folder) if name.endswith(".png")} if folder.is_dir() else set()


MOMENTS = ("any", "sampling", "renamed", "start")


@pytest.mark.parametrize(
    ("jobs", "kills"), [(12, 4), pytest.param(200, 40, marks=pytest.mark.full)], ids=["short", "long"]
)
def test_kill_9_at_random_moments(server: RealServer, jobs: int, kills: int) -> None:
    """While it waits, samples, writes down what it has done, and starts; worker and server."""
    killer = Killer(server, random.Random(jobs))
    server.start()
    struck = 0
    for number in range(jobs):
        if number % (jobs // kills) == 0:
            killer.strike(MOMENTS[struck % len(MOMENTS)], number)
            struck += 1
        else:
            submit_at_last(server, number)
    until(server.answers)
    check(server, jobs, killer)
    print("killed:", dict(killer.hits), "worker:", killer.worker_kills)
    if kills > len(MOMENTS):  # enough of each for chance not to decide
        assert set(killer.hits) == {"sampling", "renamed", "start"}
        assert killer.worker_kills > 0


def test_the_interrupted_job_runs_again_with_the_same_seed(server: RealServer) -> None:
    """Killed while it samples: the picture is that of an undisturbed run."""
    server.start()
    server.ended(server.submit(prompt(1)))  # the worker is there now
    job = started(server, with_inputs(prompt(7, 400), "save", filename_prefix="disturbed"))
    server.kill()
    server.start()
    assert server.get(f"/jobs/{job}")["status"] in ("pending", "in_progress")
    assert server.ended(job)["status"] == "completed"
    httpx.post(f"{server.url}/free", json={"free_memory": True})  # nothing is taken from the cache
    server.ended(server.submit(with_inputs(prompt(7, 400), "save", filename_prefix="undisturbed")))
    pixels = {}
    for name in ("disturbed", "undisturbed"):
        with Image.open(server.place / "output" / f"{name}_00001_.png") as picture:
            pixels[name] = picture.tobytes()
    assert pixels["disturbed"] == pixels["undisturbed"]


def started(server: RealServer, graph: dict[str, Any]) -> str:
    """A job that samples."""
    job = server.submit(graph)
    until(lambda: server.get(f"/jobs/{job}")["status"] == "in_progress")
    time.sleep(0.2)
    return job


@pytest.mark.full
@pytest.mark.parametrize(("steps", "states"), [(50, {"completed"}), (10_000, {"pending", "in_progress"})])
def test_told_to_stop(server: RealServer, steps: int, states: set[str]) -> None:
    """Not ready at once, no more jobs; what runs is done in the time that there is, or else runs again."""
    assert GRACE < 10
    server.start()
    server.ended(server.submit(prompt(1)))
    job = started(server, prompt(7, steps))
    assert server.process
    server.process.terminate()
    until(lambda: not server.answers(), period=0)
    if steps == 10_000:  # the other one may have ended by now, and the server with it
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        refused = httpx.post(f"{server.url}/prompt", json={"prompt": prompt(8)})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_stopping")
    assert server.process.wait(30) in (0, -signal.SIGTERM)
    server.start()
    assert server.get(f"/jobs/{job}")["status"] in states
    assert len(server.get("/jobs")["jobs"]) == 2


@pytest.mark.full
def test_told_to_stop_twice(server: RealServer) -> None:
    """At once, and without a word; the job runs again."""
    server.start()
    job = started(server, prompt(7, 10_000))
    assert server.process
    for _ in range(2):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert server.process.wait(GRACE - 2) in (0, 130, -signal.SIGINT)
    assert "Traceback" not in (server.place / "log").read_text(encoding="utf-8")
    server.start()
    assert server.get(f"/jobs/{job}")["status"] in {"pending", "in_progress"}


@pytest.mark.full
def test_two_servers_do_not_share_a_state(server: RealServer) -> None:
    server.start()
    other = RealServer(server.models, server.place, options=("--no-ui",))
    other.start(wait=False)
    assert other.process
    assert other.process.wait(60) == 2
    assert "Another usoflow server" in (server.place / "log").read_text(encoding="utf-8")
    assert server.stop() in (0, -signal.SIGTERM)


def test_the_same_prompt_again_shows_the_same_pictures(server: RealServer) -> None:
    """Nothing is computed again, and whoever asks still gets the answer."""
    server.start()
    first, again = (server.ended(server.submit(prompt(1))) for _ in range(2))
    assert first["outputs"]["save"]["images"]
    assert again["outputs"] == first["outputs"]
    assert "save" in server.get(f"/history/{again['id']}")[again["id"]]["status"]["messages"][1][1]["nodes"]

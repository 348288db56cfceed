"""Real processes, killed at random moments: no accepted job is lost, none is done twice, states are right."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from e2e.real_server import RealServer, until
from small import text_to_image, with_inputs


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


def submit_at_last(server: RealServer, number: int) -> None:
    """Send a job again and again, under one id, until the server says that it has it."""

    def accepted() -> bool:
        body = {"prompt": prompt(number), "prompt_id": f"job-{number}"}
        try:
            return httpx.post(f"{server.url}/prompt", json=body, timeout=30).status_code in (200, 409)
        except httpx.HTTPError:
            return False

    until(accepted)


def check(server: RealServer, jobs: int, worker_kills: int) -> None:
    """Every job is final; pictures and outputs are the same set."""
    until(lambda: server.get("/prompt")["exec_info"]["queue_remaining"] == 0, 300)
    listed = server.get("/jobs?limit=1000")["jobs"]
    assert sorted(job["id"] for job in listed) == sorted(f"job-{number}" for number in range(jobs))
    states = Counter(job["status"] for job in listed)
    assert set(states) <= {"completed", "failed"}
    assert states["failed"] <= worker_kills
    for job in listed:
        if job["status"] == "failed":
            assert job["execution_error"]["exception_type"] in ("worker_died", "out_of_memory")
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


@pytest.mark.parametrize(
    ("jobs", "kills"), [(12, 3), pytest.param(200, 24, marks=pytest.mark.full)], ids=["short", "long"]
)
def test_kill_9_at_random_moments(server: RealServer, jobs: int, kills: int) -> None:
    """Alternately the server (sometimes while it starts) and the worker (sometimes while it does)."""
    chance = random.Random(jobs)
    server.start()
    worker_kills = 0
    for number in range(jobs):
        submit_at_last(server, number)
        if number % (jobs // kills) == 0:
            time.sleep(chance.uniform(0, 3))
            if chance.random() < 0.4:
                worker_kills += server.kill_worker()
                continue
            server.kill()
            if chance.random() < 0.3:  # again, during the start
                server.start(wait=False)
                time.sleep(chance.uniform(0, 2))
                server.kill()
            server.start(wait=False)
    until(server.answers)
    check(server, jobs, worker_kills)


@pytest.mark.parametrize("end", ["kill", pytest.param("stop", marks=pytest.mark.full)])
def test_the_interrupted_job_runs_again_with_the_same_seed(server: RealServer, end: str) -> None:
    """Killed while it samples, or told to stop: the picture is that of an undisturbed run."""
    server.start()
    server.ended(server.submit(prompt(1)))  # the worker is there now
    steps = 400 if end == "kill" else 10_000  # more than a stopping server waits for
    job = server.submit(with_inputs(prompt(7, steps), "save", filename_prefix="disturbed"))
    until(lambda: server.get(f"/jobs/{job}")["status"] == "in_progress")
    time.sleep(0.2)
    getattr(server, end)()
    server.start()
    assert server.get(f"/jobs/{job}")["status"] in ("pending", "in_progress")
    if end == "stop":
        httpx.post(f"{server.url}/jobs/{job}/cancel")
        assert server.ended(job)["status"] == "cancelled"
        return
    assert server.ended(job)["status"] == "completed"
    httpx.post(f"{server.url}/free", json={"free_memory": True})  # nothing is taken from the cache
    server.ended(server.submit(with_inputs(prompt(7, steps), "save", filename_prefix="undisturbed")))
    first, second = (Image.open(server.place / "output" / f"{name}_00001_.png") for name in
                     ("disturbed", "undisturbed"))  # fmt: skip
    assert first.tobytes() == second.tobytes()


@pytest.mark.full
def test_two_servers_do_not_share_a_state(server: RealServer) -> None:
    server.start()
    other = RealServer(server.models, server.place, options=("--no-ui",))
    other.start(wait=False)
    assert other.process
    assert other.process.wait(60) == 2
    assert "Another usoflow server" in (server.place / "log").read_text(encoding="utf-8")
    assert server.stop() in (0, -signal.SIGTERM)

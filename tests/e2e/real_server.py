"""`usoflow serve` as a process of its own, to be talked to, and to be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

PATIENCE = 120.0  # seconds, on a machine that does other things as well


@dataclass
class RealServer:
    """A server over some models, with state and outputs in a folder of its own."""

    models: Path
    place: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=lambda: free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        """Start it; `wait` until it answers."""
        environment = {**os.environ, "USOFLOW_STATE": str(self.place / "state"), "OMP_NUM_THREADS": "1"}
        options = [
            "--models",
            self.models,
            "--input",
            self.place / "input",
            "--output",
            self.place / "output",
        ]
        with (self.place / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "usoflow", "serve", *map(str, options), "--port", str(self.port),
                 "--device", "cpu", "--dtype", "fp32", *self.options],
                env=environment, stdout=log, stderr=log, cwd=self.place,
            )  # fmt: skip
        if wait:
            until(self.answers)

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            return httpx.get(f"{self.url}/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return httpx.get(self.url + path, timeout=PATIENCE).json()

    def set(self, setting: str, value: Any) -> None:
        """Change a setting of the editor."""
        httpx.post(f"{self.url}/settings/{setting}", json=value).raise_for_status()

    def submit(self, prompt: Mapping[str, Any], **more: Any) -> str:
        """Send a prompt; the id of the job."""
        answer = httpx.post(f"{self.url}/prompt", json={"prompt": prompt, **more}, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["prompt_id"])

    def ended(self, job: str) -> dict[str, Any]:
        """A job when it is over."""
        until(lambda: self.get(f"/jobs/{job}")["status"] in ("completed", "failed", "cancelled"))
        return dict(self.get(f"/jobs/{job}"))

    def worker(self) -> int | None:
        """The id of the worker process, if there is one."""
        if self.process is None:
            return None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        tasks = Path(f"/proc/{self.process.pid}/task")
        with contextlib.suppress(OSError):
            for task in [children, *(path / "children" for path in tasks.iterdir())]:
                if found := task.read_text(encoding="ascii").split():
                    return int(found[0])
        return None

    def kill(self) -> None:
        """Kill -9."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def kill_worker(self) -> bool:
        """Kill -9 of the worker; whether there was one."""
        worker = self.worker()
        if worker is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        return True

    def stop(self) -> int:
        """SIGTERM, and how it ended."""
        assert self.process
        self.process.terminate()
        return self.process.wait(30)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], seconds: float = PATIENCE, period: float = 0.05) -> None:
    """Ask again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(period)

"""Does the server hold? Jobs one after another, some sockets that stall, one that listens to everything.

    python benchmarks/soak.py --models DIR --minutes 30

Prints the resident memory of server and worker (at the start, at the end, and its slope by least squares),
the sockets and file descriptors that are left, and the events that the listener missed: each job must tell of
its start, of the last step of its sampler, of its output and of its end. Steps before the last may be
replaced by newer ones; how many were is told too.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from server import Running, post, prompt, server  # type: ignore[import-not-found]  # beside this script

STALLED = 50
WARM_UP = 200  # jobs before memory is first looked at
STEPS = 4
PERIOD = 5  # seconds between looks at memory
EXPECTED = frozenset({"execution_start", f"progress {STEPS}", "executed", "execution_success"})


@dataclass
class Memory:
    """MiB that a process holds, over time; a worker that was replaced would show as a step."""

    pid: int
    times: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Look now."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        self.times.append(time.monotonic())
        self.sizes.append(int(match.group(1)) / 1024 if match else 0.0)

    def summary(self) -> dict[str, float]:
        """First, last, and the slope."""
        slope = statistics.linear_regression(self.times, self.sizes).slope * 3600
        return {
            "MiB at start": round(self.sizes[0], 1), "MiB at end": round(self.sizes[-1], 1),
            "MiB an hour": round(slope, 2), "samples": len(self.sizes),
        }  # fmt: skip


def worker_of(pid: int) -> int:
    """The one child of the server."""
    children = (path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return int(next(found for found in children if found)[0])


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def stall(port: int) -> socket.socket:
    """A client that opens `/ws` as the job's owner and reads nothing."""
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lines = (
        "GET /ws?clientId=soak HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )
    client.sendall("\r\n".join([*lines, "", ""]).encode())
    return client


def one_job(address: str, models: Path, listener: ClientConnection, seed: int) -> tuple[int, int]:
    """Run a job; how many of its events were missed, and how many steps were replaced by newer ones."""
    post(address, {"prompt": prompt(models, seed, STEPS), "client_id": "soak"})
    steps = {f"progress {step}" for step in range(1, STEPS)}
    seen: set[str] = set()
    while "execution_success" not in seen:
        message = listener.recv(timeout=120)
        if isinstance(message, str):
            event = json.loads(message)
            step = f" {event['data']['value']}" if event["type"] == "progress" else ""
            seen.add(event["type"] + step)
    return len(EXPECTED - seen), len(steps - seen)


def sockets(address: str) -> int:
    """How many WebSocket connections the server has."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        match = re.search(r"^usoflow_sockets (\S+)$", answer.read().decode(), re.MULTILINE)
    return int(float(match.group(1))) if match else -1


def soak(running: Running, models: Path, minutes: float) -> dict[str, Any]:
    """Run jobs for some minutes."""
    address, pid = running.address, running.pid
    stalled = [stall(int(address.partition(":")[2])) for _ in range(STALLED)]
    before, jobs, next_sample = sockets(address), 0, 0.0
    memory: dict[str, Memory] = {}
    files = missed = replaced = 0
    with connect(f"ws://{address}/ws?clientId=soak") as listener:
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end:
            lost, skipped = one_job(address, models, listener, jobs)
            missed, replaced = missed + lost, replaced + skipped
            jobs += 1
            if jobs == WARM_UP:
                memory = {"server": Memory(pid), "worker": Memory(worker_of(pid))}
                files = descriptors(pid)
            if jobs >= WARM_UP and time.monotonic() > next_sample:
                next_sample = time.monotonic() + PERIOD
                for process in memory.values():
                    process.sample()
        if any(len(process.sizes) < 2 for process in memory.values()) or not memory:
            raise SystemExit(f"{jobs} jobs in {minutes} minutes: memory is looked at after {WARM_UP}.")
        after = {"sockets at end": sockets(address), "files at end": descriptors(pid)}
    for client in stalled:
        client.close()
    return {
        "minutes": minutes, "jobs": jobs, "events missed": missed, "steps replaced": replaced,
        "sockets at start": before, "files at start": files, **after,
        **{name: found.summary() for name, found in memory.items()},
    }  # fmt: skip


def main() -> None:
    """Start a server, soak it, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    with server(arguments.models) as running:
        print(json.dumps(soak(running, arguments.models, arguments.minutes), indent=1))


if __name__ == "__main__":
    main()

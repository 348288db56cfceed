"""Does the server hold? Jobs one after another, some sockets that stall, one that listens to everything.

    python benchmarks/soak.py --models DIR --minutes 30

Prints the resident memory of the server (at the start, at the end, and what a job adds), the sockets that
are left, and the events that the listener missed: each job must tell of its start, its output and its end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from server import post, prompt

STALLED = 50
WARM_UP = 20  # jobs before memory is first looked at
EXPECTED = frozenset({"execution_start", "executed", "execution_success"})


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(match.group(1)) / 1024 if match else 0.0


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


def one_job(address: str, listener: ClientConnection, seed: int) -> set[str]:
    """Run a job; which of the messages that matter were missed."""
    post(address, {"prompt": prompt(seed, 4), "client_id": "soak"})
    seen: set[str] = set()
    while "execution_success" not in seen:
        message = listener.recv(timeout=120)
        if isinstance(message, str):
            seen.add(json.loads(message)["type"])
    return set(EXPECTED) - seen


def soak(port: int, pid: int, minutes: float) -> dict[str, Any]:
    """Run jobs for some minutes."""
    address = f"127.0.0.1:{port}"
    stalled = [stall(port) for _ in range(STALLED)]
    jobs, missed, first = 0, 0, 0.0
    with connect(f"ws://{address}/ws?clientId=soak") as listener:
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end or jobs <= WARM_UP:
            missed += len(one_job(address, listener, jobs))
            jobs += 1
            if jobs == WARM_UP:
                first = resident(pid)
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        metrics = answer.read().decode()
    last = resident(pid)
    for client in stalled:
        client.close()
    sockets = re.search(r"^usoflow_sockets (\S+)$", metrics, re.MULTILINE)
    return {
        "jobs": jobs, "events missed": missed, "MiB at start": round(first, 1), "MiB at end": round(last, 1),
        "KiB a job": round((last - first) * 1024 / (jobs - WARM_UP), 2),
        "sockets left": float(sockets.group(1)) if sockets else None,
    }  # fmt: skip


def main() -> None:
    """Start a server, soak it, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "usoflow", "serve", "--models", arguments.models, "--output", folder,
             "--port", str(port), "--no-ui"],
            env={**os.environ, "USOFLOW_STATE": folder, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            time.sleep(5)
            print(json.dumps(soak(port, process.pid, arguments.minutes), indent=1))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()

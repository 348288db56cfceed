"""How fast the server answers: start to first 200, accepting a job, events to a client.

    python benchmarks/server.py --models DIR

DIR holds the tutorial's models or some that take their places; `write_untrained` of tests/untrained.py makes
small ones in a second.
Prints one Markdown table row a measure.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

from usoflow import Engine, Workflow

TEMPLATE = "template:flux1_dev_uso_reference_image_gen"
JOBS = 200


@dataclass(frozen=True)
class Running:
    """A server: its address, its process, and the seconds from its start to the first 200."""

    address: str
    pid: int
    seconds: float


@contextmanager
def server(models: Path) -> Iterator[Running]:
    """Start a server on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "usoflow", "serve", "--models", models, "--output", folder,
             "--port", str(port), "--no-ui"],
            env={**os.environ, "USOFLOW_STATE": folder, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        address = f"127.0.0.1:{port}"
        try:
            while not _answers(address):
                if process.poll() is not None:
                    raise SystemExit(f"usoflow serve --models {models} ended: {process.returncode}.")
                time.sleep(0.005)
            yield Running(address, process.pid, time.perf_counter() - start)
        finally:
            process.terminate()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/") as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def prompt(models: Path, seed: int, steps: int) -> dict[str, Any]:
    """The official template's prompt, small, for the models that are there."""
    found = _template(models).prompt
    for name in ("width", "height"):
        found = found.set("EmptySD3LatentImage", name, 64)
    found = found.set("ImageScaleToMaxDimension", "largest_size", 64)
    return found.set("KSampler", "seed", seed).set("KSampler", "steps", steps).to_json()


@functools.cache
def _template(models: Path) -> Workflow:
    return Engine(models=models).load(TEMPLATE)


def post(address: str, body: dict[str, Any]) -> float:
    """Send a prompt; seconds until it is accepted."""
    request = urllib.request.Request(f"http://{address}/prompt", json.dumps(body).encode())
    start = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        answer.read()
    return time.perf_counter() - start


def events_per_second(address: str, models: Path) -> float:
    """Messages a second to the client of a job that does little but report."""
    with connect(f"ws://{address}/ws?clientId=bench") as client:
        post(address, {"prompt": prompt(models, 1, 1), "client_id": "bench"})
        _until_end(client)
        start = time.perf_counter()
        post(address, {"prompt": prompt(models, 2, 300), "client_id": "bench"})
        return _until_end(client) / (time.perf_counter() - start)


def _until_end(client: Any) -> int:
    """Receive until the job is over; how many messages that were."""
    count = 0
    while True:
        message = client.recv(timeout=120)
        count += 1
        if isinstance(message, str) and '"type": "execution_success"' in message:
            return count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    models = parser.parse_args().models
    starts = []
    for _ in range(3):
        with server(models) as running:
            starts.append(running.seconds)
    with server(models) as running:
        rate = events_per_second(running.address, models)
        prompts = [{"prompt": prompt(models, number, 1)} for number in range(JOBS)]
        latencies = sorted(post(running.address, body) for body in prompts)
    print(f"| start to first 200 (median of 3) | {statistics.median(starts):.2f} s |")
    middle, slow = latencies[JOBS // 2] * 1e3, latencies[int(JOBS * 0.99)] * 1e3
    print(f"| accept a job, p50 / p99 of {JOBS} | {middle:.1f} / {slow:.1f} ms |")
    print(f"| events to a client, 300 steps of an untrained model | {rate:.0f} /s |")


if __name__ == "__main__":
    main()

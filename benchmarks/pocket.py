"""The pocket models on a CPU: commands, phase by phase; and EasyCache, where a picture means something."""

from __future__ import annotations

import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.quality import psnr, ssim
from benchmarks.report import Plot, Table
from benchmarks.server import server
from usoflow.api.engine import Engine
from usoflow.api.result import Result
from usoflow.api.workflow import Workflow
from usoflow.settings import POCKET_MODELS

GRAPH = Path("examples/pocket.json")
SIZE, STEPS = (128, 128), 20
PROMPTS = ("a red apple", "a yellow duck on grass", "a blue fish under water", "a green tree in the snow")
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)


def cold_and_warm(rounds: int) -> Iterator[Table]:
    """`usoflow run examples/pocket.json` as a new process, and in one that has drawn a picture already."""
    with tempfile.TemporaryDirectory() as folder:
        cold = [_cold(Path(folder), seed) for seed in range(rounds)]
        with Engine(models=POCKET_MODELS, output=folder, device="cpu") as engine:
            _drawn(engine, PROMPTS[0], seed=0)
            warm = [_phases(_drawn(engine, PROMPTS[0], seed=1 + n)) for n in range(rounds)]
    phases = list(dict.fromkeys(phase for run in (*cold, *warm) for phase in run))
    rows = [[phase, _median(cold, phase), _median(warm, phase)] for phase in phases]
    yield Table(
        "Pocket, phase by phase",
        f"{SIZE[0]}x{SIZE[1]}, {STEPS} steps, text only; ms, medians of {rounds}. Cold is from the start of"
        " the process to its end with the file written.",
        ["", "cold", "warm, another seed"],
        rows,
        raw={"cold": cold, "warm": warm},
    )


def serve(rounds: int) -> Table:
    """From the start of the process to the first full answer."""
    times = [_object_info() for _ in range(rounds)]
    median = statistics.median(times)
    return Table(
        "usoflow serve",
        f"Start of the process to the first whole `/object_info`; median of {rounds}.",
        ["", "seconds"],
        [["first /object_info", f"{median:.2f}"]],
        raw=times,
    )


def easycache(seeds: int) -> Table:
    """Each threshold beside the exact run, and beside as many steps as its time would have paid for."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(models=POCKET_MODELS, output=folder, device="cpu") as engine,
    ):
        wanted = [(prompt, seed) for prompt in PROMPTS for seed in range(seeds)]
        _drawn(engine, PROMPTS[0], seeds)  # of none that is wanted: what is known is not computed again
        rows, raw = [], {}
        for threshold in THRESHOLDS:
            row = _threshold(engine, wanted, threshold)
            raw[threshold] = row
            rows.append([f"{threshold:g}", *row.values()])
    return Table(
        "EasyCache on the pocket models",
        f"{len(wanted)} pictures of {SIZE[0]}x{SIZE[1]}, {STEPS} steps: means against the exact run, in turn."
        " Fewer steps: plainly as many as the same time pays for.",
        ["threshold", *next(iter(raw.values()))],
        rows,
        raw=raw,
        plots={"easycache": _plot(raw)},
    )


def _plot(raw: Mapping[float, Mapping[str, str]]) -> Plot:
    times = [float(row["speed-up"].rstrip("x")) for row in raw.values()]
    return Plot(
        "speed-up",
        "PSNR in dB",
        {
            "EasyCache": (times, [float(row["PSNR dB"]) for row in raw.values()]),
            "fewer steps": (times, [float(row["fewer steps: PSNR dB"]) for row in raw.values()]),
        },
    )


def _threshold(engine: Engine, wanted: Sequence[tuple[str, int]], threshold: float) -> dict[str, str]:
    exact, cached = [], []
    with _skips() as skips:
        for prompt, seed in wanted:  # in turn: the machine is not the same a minute later
            exact.append(_drawn(engine, prompt, seed))
            cached.append(_drawn(engine, prompt, seed, easycache=threshold))
    speedup = statistics.median(_sampling(a) / _sampling(b) for a, b in zip(exact, cached, strict=True))
    steps = max(1, round(STEPS / speedup))
    fewer = [_drawn(engine, prompt, seed, steps=steps) for prompt, seed in wanted]
    return {
        "skipped": f"{statistics.mean(skips):.1f} of {STEPS}",
        "speed-up": f"{speedup:.2f}x",
        "PSNR dB": _mean(psnr, cached, exact, 1),
        "SSIM": _mean(ssim, cached, exact, 3),
        "fewer steps": str(steps),
        "fewer steps: PSNR dB": _mean(psnr, fewer, exact, 1),
        "fewer steps: SSIM": _mean(ssim, fewer, exact, 3),
    }


def _mean(measure: Any, found: Sequence[Result], exact: Sequence[Result], digits: int) -> str:
    values = [measure(a.images[0], b.images[0]) for a, b in zip(found, exact, strict=True)]
    return f"{statistics.mean(min(value, 99.0) for value in values):.{digits}f}"


@contextmanager
def _skips() -> Iterator[list[int]]:
    """How many steps each run skipped, as it logs."""
    found: list[int] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := re.match(r"EasyCache skipped (\d+) of", record.getMessage()):
                found.append(int(match.group(1)))

    logger, handler = logging.getLogger("usoflow.nodes.denoising"), Heard()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _drawn(
    engine: Engine, prompt: str, seed: int, *, steps: int = STEPS, easycache: float | None = None
) -> Result:
    return engine.run(_workflow(prompt, seed, steps, easycache))


def _workflow(prompt: str, seed: int, steps: int, easycache: float | None) -> Workflow:
    """The example with its values set, and with EasyCache before the sampler on request."""
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    text = next(node for node in graph.values() if node["class_type"] == "CLIPTextEncode")
    sampler = next(node for node in graph.values() if node["class_type"] == "KSampler")
    text["inputs"]["text"] = prompt
    sampler["inputs"] |= {"seed": seed, "steps": steps}
    if easycache is not None:
        inputs = {"reuse_threshold": easycache, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
        node = {"class_type": "EasyCache", "inputs": inputs | {"model": sampler["inputs"]["model"]}}
        sampler["inputs"]["model"] = ["easycache", 0]
        graph["easycache"] = node
    return Workflow.load(graph)


def _sampling(result: Result) -> float:
    return sum(node.seconds for node in result.nodes if node.class_type == "KSampler")


def _phases(result: Result) -> dict[str, float]:
    found: dict[str, float] = {}
    for node in result.nodes:
        found[node.class_type] = found.get(node.class_type, 0.0) + node.seconds
    return found | {"whole": result.seconds}


def _cold(folder: Path, seed: int) -> dict[str, float]:
    command = [
        sys.executable, "-m", "usoflow", "run", str(GRAPH), "--seed", str(seed),
        "--models", str(POCKET_MODELS), "--output", str(folder), "--device", "cpu",
        "--json",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - start
    record = json.loads(done.stdout.splitlines()[-1])
    found = {"start, imports, headers": whole - record["seconds"]}
    for node in record["nodes"]:
        found[node["class_type"]] = found.get(node["class_type"], 0.0) + node["seconds"]
    return found | {"whole": whole}


def _object_info() -> float:
    with server(POCKET_MODELS) as running:
        start = time.perf_counter()
        with urllib.request.urlopen(f"http://{running.address}/object_info") as answer:
            answer.read()
        return running.seconds + time.perf_counter() - start


def _median(runs: Sequence[Mapping[str, float]], phase: str) -> str:
    values = [run[phase] for run in runs if phase in run]
    return f"{statistics.median(values) * 1000:.0f}" if values else ""

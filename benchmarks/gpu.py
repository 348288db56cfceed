"""FLUX.1 on a GPU beside diffusers: steps, pictures, matrix rate, memory, budgets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import step, synthetic
from benchmarks.report import Table
from benchmarks.timing import seconds
from usoflow.models.checkpoint import TensorFile
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement

CHECKPOINT = "checkpoints/flux1-dev-{}.safetensors"
BUDGETS = (24, 16, 12, 8)  # GB
SIDE = 8192  # of the matrices whose product gives the rate


def tables(scratch: Path | None, rounds: int, *, quick: bool) -> Iterator[Table]:
    """On the GPU at full size; where there is none, small on the CPU, and the title says so."""
    gpu = torch.cuda.is_available()
    depth = synthetic.FULL if gpu and not quick else synthetic.SHALLOW
    files = {CHECKPOINT.format("bf16"): synthetic.transformer(depth, "BF16")}
    files[CHECKPOINT.format("fp8")] = synthetic.transformer(depth, "F8_E4M3")
    with synthetic.written(files, scratch) as models:
        yield _steps(models, rounds, gpu=gpu, quick=quick)
        yield _budgets(models, rounds, gpu=gpu)


def _steps(models: Path, rounds: int, *, gpu: bool, quick: bool) -> Table:
    device, side = ("cuda", 1024) if gpu else ("cpu", 64)
    text = step.TEXT_TOKENS if gpu else step.QUICK_TEXT
    path = models / CHECKPOINT.format("bf16")
    contest = step.Contest(path, ["bf16"], compiled=gpu and not quick, device=device)
    fp8 = step.load(models / CHECKPOINT.format("fp8"), "bf16", device=device)
    contest.ours["usoflow fp8"] = fp8, torch.bfloat16
    cases = [
        step.Case("text", (side, side), text=text),
        step.Case("+ subject and style", (side, side), (side // 2,), style=True, text=text),
        step.Case("four, + subject and style", (side, side), (side,), style=True, batch=4, text=text),
    ]
    rate = _rate(device, side=SIDE if gpu else 512)
    rows, raw = [], {}
    for case in cases:
        _reset(device)
        times = contest.run(case, rounds)
        raw[case.name] = dict(times.seconds)
        work = case.batch * case.tokens * _block_weights(fp8) * 2
        cells = [f"{times.median(n):.3f} ({work / times.median(n) / rate:.0%})" for n in times.seconds]
        rows.append([case.name, *cells, _peak(device)])
    return Table(
        f"GPU: {torch.cuda.get_device_name()}" if gpu else "GPU section on a CPU: there is no GPU here",
        f"Seconds of a step at {side}x{side}; in brackets the part of the measured rate of a bf16 product"
        f" ({rate / 1e12:.1f} TFLOP/s) that the blocks' products alone come to. Medians of {rounds} in turn."
        " Peak memory is of all competitors together.",
        ["", *next(iter(raw.values())), "peak, GB"],
        rows,
        raw=raw,
    )


def _budgets(models: Path, rounds: int, *, gpu: bool) -> Table:
    """One model at a time, by what it may hold."""
    device = "cuda" if gpu else "cpu"
    component = TensorFile.open(models / CHECKPOINT.format("fp8")).components()["flux"]
    budgets = BUDGETS if gpu else (4, 1, 0.5)
    rows: list[list[str]] = []
    for budget in budgets:
        _reset(device)
        library = ModelLibrary(Placement.choose(device, "bf16", budget=int(budget * 1e9)))
        with torch.inference_mode():
            flux = library.flux(component, (), "default")
        side = 1024 if gpu else 128
        text = step.TEXT_TOKENS if gpu else step.QUICK_TEXT
        given = step.inputs_of(step.Case("text", (side, side), text=text), flux, torch.device(device))
        one = step.ours(flux, given, torch.bfloat16)
        with torch.inference_mode():
            one()
            times = sorted(seconds(one) for _ in range(rounds))
        rows.append([f"{budget:g} GB", f"{times[len(times) // 2]:.3f}", _peak(device)])
        library.clear()
    return Table(
        "Budgets for the weights",
        "fp8 checkpoint, text only; seconds of a step and peak memory (on a CPU, of the process).",
        ["--vram", "seconds", "peak, GB"],
        rows,
    )


def _block_weights(flux: Any) -> int:
    """Weights that every token meets: without modulations, half of a double block's."""
    c = flux.config
    attention, mlp = 4 * c.hidden**2, 2 * c.hidden * c.mlp_dim
    return (c.double_blocks + c.single_blocks) * (attention + mlp)


def _rate(device: str, side: int) -> float:
    """FLOP/s of a large bf16 product."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds(lambda: a @ a)
    return 2 * side**3 / min(seconds(lambda: a @ a) for _ in range(10))


def _reset(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> str:
    from usoflow.execution.memory import PeakMemory

    if device == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
    return f"{PeakMemory(torch.device('cpu')).bytes() / 1e9:.1f}"

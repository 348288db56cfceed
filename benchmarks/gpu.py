"""FLUX.1 on a GPU beside diffusers: steps, whole loops, matrix rate, memory, budgets.

One competitor at a time is on the device: two would not fit the smaller ones, and so each has a peak of its
own. Where there is no GPU, the same runs at a CPU's size, and every title says so.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peer, step, synthetic
from benchmarks.report import Table
from benchmarks.timing import seconds
from usoflow.execution.memory import PeakMemory
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux import OFFICIAL_DEPTH, Flux, FluxConfig
from usoflow.models.library import ModelLibrary, load_flux
from usoflow.models.placement import PART_OF_GPU, Placement
from usoflow.models.residence import Sizes

CHECKPOINT = "checkpoints/flux1-dev-{}.safetensors"
REFERENCE = "diffusers"  # to whose answer distances are
Answering = Callable[[step.Inputs], step.Velocity]


@dataclass(frozen=True, slots=True)
class Extent:
    """How large everything is."""

    device: str
    depth: tuple[int, int]  # of the transformer
    side: int  # of the picture
    subjects: tuple[int, int]  # sides
    text: int  # tokens
    steps: int  # of a loop
    matrix: int  # side of the matrices whose product gives the rate
    budgets: tuple[float, ...]  # GB

    @classmethod
    def of(cls, *, gpu: bool, quick: bool) -> Extent:
        """Full on a GPU, unless it is to be quick."""
        if gpu:
            depth, steps = (synthetic.SHALLOW, 2) if quick else (OFFICIAL_DEPTH, 20)
            return cls("cuda", depth, 1024, (512, 1024), step.TEXT_TOKENS, steps, 8192, (24, 16, 12, 8))
        steps = 2 if quick else 20
        return cls("cpu", synthetic.SHALLOW, 64, (32, 64), step.QUICK_TEXT, steps, 512, (4, 1, 0.5))

    @property
    def cases(self) -> list[step.Case]:
        """What is denoised."""
        size, (small, large) = (self.side, self.side), self.subjects
        return [
            step.Case("text", size, text=self.text),
            step.Case(f"+ subject {small}, style", size, (small,), style=True, text=self.text),
            step.Case(f"four, + subject {large}", size, (large,), batch=4, text=self.text),
        ]

    def title(self, text: str) -> str:
        """With the GPU's name, or that there is none."""
        if self.device == "cuda":
            return f"{text}: {torch.cuda.get_device_name()}"
        return f"{text}: no GPU here, small sizes on a CPU in its place"


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a competitor in a case: seconds, the most bytes that were held, distance to the reference."""

    steps: list[float]
    loops: list[float]
    peak: int
    distance: float

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def loop(self) -> float:
        return statistics.median(self.loops)


Results = Mapping[str, Mapping[step.Case, Measured]]


def tables(scratch: Path | None, rounds: int, *, quick: bool) -> Iterator[Table]:
    """All of it; compiled ones only if it need not be quick."""
    extent = Extent.of(gpu=torch.cuda.is_available(), quick=quick)
    files = {
        CHECKPOINT.format("bf16"): synthetic.transformer(extent.depth, "BF16"),
        CHECKPOINT.format("fp8"): synthetic.transformer(extent.depth, "F8_E4M3"),
    }
    with synthetic.written(files, scratch) as models:
        component = _transformer(models / CHECKPOINT.format("bf16"))
        results = _contest(component, extent, rounds, compiled=not quick)
        config = FluxConfig.from_component(component)
        yield _steps(results, extent, config, rounds)
        yield _loops(results, extent, rounds)
        yield _memory(results, extent)
        yield _budgets(models, extent, rounds)


def _contest(component: Component, extent: Extent, rounds: int, *, compiled: bool) -> Results:
    """Every competitor, one after another; those in bf16 must answer as the reference does."""
    ways: dict[str, Callable[[], Answering]] = {
        REFERENCE: partial(_diffusers, component, extent.device, compiled=False),
        "usoflow": partial(_usoflow, component, extent.device, "default", compiled=False),
        "usoflow fp8": partial(_usoflow, component, extent.device, "fp8_e4m3fn", compiled=False),
    }
    if compiled:
        ways |= {
            "diffusers compiled": partial(_diffusers, component, extent.device, compiled=True),
            "usoflow compiled": partial(_usoflow, component, extent.device, "default", compiled=True),
            "usoflow fp8 compiled": partial(_usoflow, component, extent.device, "fp8_e4m3fn", compiled=True),
        }
    with torch.device("meta"):
        shape = Flux(FluxConfig.from_component(component))
    answers: dict[step.Case, Tensor] = {}
    results = {}
    for name, load in ways.items():
        try:
            results[name] = _case_by_case(load(), shape, extent, rounds, answers)
        except torch.OutOfMemoryError:
            print(f"{name} does not fit this GPU.")
        else:
            _require_agreement(name, results[name])
        _forget()
    return results


def _case_by_case(
    answering: Answering, shape: Flux, extent: Extent, rounds: int, answers: dict[step.Case, Tensor]
) -> Mapping[step.Case, Measured]:
    found = {}
    for case in extent.cases:
        given = step.inputs_of(case, shape, torch.device(extent.device))
        found[case] = _measured(answering, given, extent, rounds, answers, case)
    return found


def _require_agreement(name: str, found: Mapping[step.Case, Measured]) -> None:
    """Of those in bf16; fp8 rounds more, the distance is told."""
    for case, measured in found.items():
        if "fp8" not in name and not measured.distance < step.BOUNDS["bf16"]:
            raise SystemExit(f"{case}: {name} is {measured.distance:.2g} from {REFERENCE}.")


def _measured(
    answering: Answering,
    given: step.Inputs,
    extent: Extent,
    rounds: int,
    answers: dict[step.Case, Tensor],
    case: step.Case,
) -> Measured:
    sigma = torch.tensor(step.SIGMA, device=given.latent.device)
    with torch.inference_mode():
        velocity = answering(given)
        answer = velocity(given.latent, sigma).double().cpu()
        expected = answers.setdefault(case, answer)
        peak = PeakMemory(torch.device(extent.device))
        steps = [seconds(lambda: velocity(given.latent, sigma)) for _ in range(rounds)]
        loops = [seconds(lambda: _loop(velocity, given.latent, extent.steps)) for _ in range(rounds)]
    return Measured(steps, loops, peak.bytes(), float((answer - expected).norm() / expected.norm()))


def _loop(velocity: step.Velocity, latent: Tensor, steps: int) -> Tensor:
    """Euler's method from noise to a picture."""
    x = latent
    for now, then in pairwise(torch.linspace(1, 0, steps + 1, device=latent.device)):
        x = x + (then - now) * velocity(x, now)
    return x


def _usoflow(component: Component, device: str, weight_dtype: str, *, compiled: bool) -> Answering:
    library = ModelLibrary(Placement.choose(device, "bf16", compiled=compiled))
    with torch.inference_mode():
        flux = library.flux(component, (), weight_dtype)

    def answering(given: step.Inputs) -> step.Velocity:
        velocity = step.our_velocity(flux, given, torch.bfloat16)
        for _ in range(1 + compiled):  # a first run is never compiled
            library.begin_run()
            velocity(given.latent, torch.tensor(step.SIGMA, device=given.latent.device))
        return velocity

    return answering


def _diffusers(component: Component, device: str, *, compiled: bool) -> Answering:
    model = peer.twin(load_flux(component), torch.bfloat16).to(device)
    way: Any = torch.compile(model, dynamic=False) if compiled else model
    return lambda given: step.their_velocity(way, given)


def _steps(results: Results, extent: Extent, config: FluxConfig, rounds: int) -> Table:
    rate = _rate(extent.device, extent.matrix)

    def cell(case: step.Case, found: Measured) -> str:
        achieved = _work(case, config) / found.step
        return f"{found.step:.3f} ({achieved / 1e12:.1f}, {achieved / rate:.0%})"

    return Table(
        extent.title("Step"),
        f"Seconds of a step at {extent.side}x{extent.side}; in brackets TFLOP/s of the blocks' products and"
        f" attention, and their part of the measured rate of a bf16 product ({rate / 1e12:.1f} TFLOP/s; fp8"
        f" may go beyond it). Medians of {rounds}, each competitor alone on the device.",
        ["", "tokens", *results],
        [
            [case.name, str(case.tokens), *(cell(case, found[case]) for found in results.values())]
            for case in extent.cases
        ],
        raw={name: {case.name: m.steps for case, m in found.items()} for name, found in results.items()},
    )


def _loops(results: Results, extent: Extent, rounds: int) -> Table:
    return Table(
        extent.title(f"Loop of {extent.steps} steps"),
        f"Seconds of all steps of a picture, without encoders and VAE. Medians of {rounds}.",
        ["", *results],
        [[case.name, *(f"{found[case].loop:.2f}" for found in results.values())] for case in extent.cases],
        raw={name: {case.name: m.loops for case, m in found.items()} for name, found in results.items()},
    )


def _memory(results: Results, extent: Extent) -> Table:
    return Table(
        extent.title("Memory and distance"),
        f"Peak in GB while it computes (on a CPU, of the process); relative L2 distance of a step's answer to"
        f" that of {REFERENCE}. fp8 weights are those of bf16, rounded.",
        ["", *(f"{case.name}: {what}" for case in extent.cases for what in ("peak", "distance"))],
        [
            [name, *(t for m in found.values() for t in (f"{m.peak / 1e9:.1f}", f"{m.distance:.1e}"))]
            for name, found in results.items()
        ],
    )


def _budgets(models: Path, extent: Extent, rounds: int) -> Table:
    """As on smaller cards: what may be allocated is capped, weights get the usual part of that."""
    rows = []
    for storage in ("bf16", "fp8"):
        component = _transformer(models / CHECKPOINT.format(storage))
        for budget in extent.budgets:
            with _capped(extent.device, budget * 1e9):
                try:
                    cells = _within(component, extent, int(PART_OF_GPU * budget * 1e9), rounds)
                except torch.OutOfMemoryError:
                    cells = ["", "out of memory", ""]
            rows.append([storage, f"{budget:g} GB", *cells])
            _forget()
    return Table(
        extent.title("Budgets"),
        "Text only; seconds of a step and peak memory (on a CPU, of the process), where no more than so much"
        f" can be allocated (on a GPU), of which {PART_OF_GPU:g} are for weights.",
        ["stored", "memory", "blocks that stay", "seconds", "peak, GB"],
        rows,
    )


def _within(component: Component, extent: Extent, budget: int, rounds: int) -> list[str]:
    device = torch.device(extent.device)
    library = ModelLibrary(Placement.choose(extent.device, "bf16", budget=budget, compiled=False))
    with torch.inference_mode():
        flux = library.flux(component, (), "default")
        given = step.inputs_of(extent.cases[0], flux, device)
        velocity = step.our_velocity(flux, given, torch.bfloat16)
        sigma = torch.tensor(step.SIGMA, device=device)
        velocity(given.latent, sigma)
        peak = PeakMemory(device)
        found = statistics.median(seconds(lambda: velocity(given.latent, sigma)) for _ in range(rounds))
    resident = Sizes.of(flux, flux.blocks, torch.bfloat16).resident(budget)
    stay = f"{resident} of {len(flux.blocks)}" if extent.device == "cuda" else ""
    return [stay, f"{found:.3f}", f"{peak.bytes() / 1e9:.1f}"]


@contextmanager
def _capped(device: str, size: float) -> Iterator[None]:
    """No more than this many bytes can be allocated on a GPU."""
    if device != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _work(case: step.Case, config: FluxConfig) -> float:
    """FLOP of the blocks' products and attention; modulations are a row for each picture."""
    weights = 4 * config.hidden**2 + 2 * config.hidden * config.mlp_dim  # that every token meets
    attention = 2 * case.tokens * config.hidden  # multiplications of a token, with all keys and values
    return (
        2.0 * case.batch * case.tokens * (config.double_blocks + config.single_blocks) * (weights + attention)
    )


def _rate(device: str, side: int) -> float:
    """FLOP/s of a large bf16 product."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds(lambda: a @ a)
    return 2 * side**3 / min(seconds(lambda: a @ a) for _ in range(10))


def _transformer(path: Path) -> Component:
    return TensorFile.open(path).components()["flux"]


def _forget() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

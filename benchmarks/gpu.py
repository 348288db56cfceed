"""FLUX.1 on a GPU beside diffusers: steps, whole loops, matrix rate, memory, budgets.

One competitor at a time is on the device: two would not fit the smaller ones, and so each has a peak of its
own. It is loaded once, and measured eagerly before its blocks are compiled. What is measured is printed at
once, and what fails is named in the tables: the others are measured all the same. Where there is no GPU, the
same runs at a CPU's size, and every title says so.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import peer, step, synthetic
from benchmarks.report import Table
from benchmarks.timing import seconds
from usoflow.execution.memory import PeakMemory
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux import Flux
from usoflow.models.flux_config import OFFICIAL_DEPTH, FluxConfig
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_flux
from usoflow.models.placement import PART_OF_GPU, Placement
from usoflow.models.residence import Sizes

CHECKPOINT = "checkpoints/flux1-dev-{}.safetensors"
REFERENCE = "diffusers"  # to whose answer distances are
COMPETITORS = (REFERENCE, "usoflow", "usoflow fp8")

T = TypeVar("T")
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
    def bound(self) -> float:
        """Of the distance of two that compute in bf16: their roundings add up, from block to block."""
        return step.BOUNDS["bf16"] * (sum(self.depth) / sum(synthetic.SHALLOW)) ** 0.5

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
    """Of a competitor in a case: seconds, the most bytes that were held, distance to the reference.

    Attributes:
        loop: None for a batch, of which steps tell enough.
        distance: None without the reference.
        wrong: in bf16 it is beyond what rounding makes of it, so that there is nothing to compare.
    """

    steps: list[float]
    loop: float | None
    peak: int
    distance: float | None
    wrong: bool

    @property
    def step(self) -> float:
        return statistics.median(self.steps)


Results = Mapping[str, Mapping[step.Case, Measured | str]]  # or why there is none


def tables(
    scratch: Path | None, rounds: int, *, quick: bool, only: Collection[str] = COMPETITORS
) -> Iterator[Table]:
    """All of it, for these competitors; on a CPU compiled ones only if it need not be quick."""
    extent = Extent.of(gpu=torch.cuda.is_available(), quick=quick)
    compiled = extent.device == "cuda" or not quick
    files = {
        CHECKPOINT.format("bf16"): synthetic.transformer(extent.depth, "BF16"),
        CHECKPOINT.format("fp8"): synthetic.transformer(extent.depth, "F8_E4M3"),
    }
    with synthetic.written(files, scratch) as models:
        component = _transformer(models / CHECKPOINT.format("bf16"))
        results = _contest(component, extent, rounds, only, compiled=compiled)
        config = FluxConfig.from_component(component)
        yield _steps(results, extent, config, rounds)
        yield _loops(results, extent)
        yield _memory(results, extent)
        yield _budgets(models, extent, rounds)


def _contest(
    component: Component, extent: Extent, rounds: int, only: Collection[str], *, compiled: bool
) -> Results:
    """Every competitor, one after another, eagerly and then compiled."""
    entries: dict[str, Iterator[Answering]] = {
        REFERENCE: _diffusers(component, extent.device),
        "usoflow": _usoflow(component, extent.device, "default", compiled=compiled),
        "usoflow fp8": _usoflow(component, extent.device, "fp8_e4m3fn", compiled=compiled),
    }
    with torch.device("meta"):
        shape = Flux(FluxConfig.from_component(component))
    answers: dict[step.Case, Tensor] = {}
    results: dict[str, dict[step.Case, Measured | str]] = {}
    for entry in only:
        answering: Any = None  # an `Answering`, or in words why there is none
        for name in (entry, f"{entry} compiled") if compiled else (entry,):
            if not isinstance(answering, str):
                answering = _attempt(partial(next, entries[entry]))
            results[name] = {}
            for case in extent.cases:
                measure = partial(_measured, name, answering, shape, extent, rounds, answers, case)
                results[name][case] = answering if isinstance(answering, str) else _attempt(measure)
                print(f"{name}, {case.name}: {results[name][case]}", flush=True)
        del answering, measure, entries[entry]
        _forget()
    return results


def _attempt(way: Callable[[], T]) -> T | str:
    """What it gives, or in a few words why it gave nothing."""
    try:
        return way()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # of many kinds: a competitor's own, its compiler's
        reason = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {reason}"


def _measured(
    name: str,
    answering: Answering,
    shape: Flux,
    extent: Extent,
    rounds: int,
    answers: dict[step.Case, Tensor],
    case: step.Case,
) -> Measured:
    device = torch.device(extent.device)
    given, sigma = step.inputs_of(case, shape, device), torch.tensor(step.SIGMA, device=device)
    with torch.inference_mode():
        velocity = answering(given)
        answer = velocity(given.latent, sigma).double().cpu()
        if name == REFERENCE:
            answers[case] = answer
        expected = answers.get(case)
        distance = None if expected is None else float((answer - expected).norm() / expected.norm())
        wrong = distance is not None and "fp8" not in name and not distance < extent.bound
        peak = PeakMemory(device)
        steps = [seconds(lambda: velocity(given.latent, sigma)) for _ in range(rounds)]
        single = case.batch == 1
        loop = seconds(lambda: _loop(velocity, given.latent, extent.steps)) if single else None
    return Measured(steps, loop, peak.bytes(), distance, wrong)


def _loop(velocity: step.Velocity, latent: Tensor, steps: int) -> Tensor:
    """Euler's method from noise to a picture."""
    x = latent
    for now, then in pairwise(torch.linspace(1, 0, steps + 1, device=latent.device)):
        x = x + (then - now) * velocity(x, now)
    return x


def _usoflow(component: Component, device: str, weight_dtype: str, *, compiled: bool) -> Iterator[Answering]:
    """Eagerly, then compiled: what a run asks for that one before it had asked for."""
    library = ModelLibrary(_placement(device, compiled=compiled))
    with torch.inference_mode():
        flux = library.flux(component, (), weight_dtype)

    def answering(given: step.Inputs) -> step.Velocity:
        library.begin_run()
        return step.our_velocity(flux, given, torch.bfloat16)

    yield answering
    yield answering


def _placement(device: str, *, compiled: bool, budget: int | None = None) -> Placement:
    """As a GPU has it by itself; on a CPU, whichever it is, in bf16 too."""
    chosen = Placement.choose(device, "bf16", budget, compiled=compiled)
    return replace(chosen, fastest=device == "cuda")


def _diffusers(component: Component, device: str) -> Iterator[Answering]:
    """Eagerly, then compiled: each type of block, as diffusers advises."""
    model: Any = peer.twin(load_flux(component), torch.bfloat16, device)
    yield partial(step.their_velocity, model)
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    yield partial(step.their_velocity, model)


def _steps(results: Results, extent: Extent, config: FluxConfig, rounds: int) -> Table:
    rate = _rate(extent.device, extent.matrix)

    def cell(case: step.Case, found: Measured | str) -> str:
        if isinstance(found, str):
            return found
        achieved = _work(case, config) / found.step
        said = "wrong answers: " if found.wrong else ""
        return f"{said}{found.step:.3f} ({achieved / 1e12:.1f}, {achieved / rate:.0%})"

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
        raw={name: {case.name: _raw(m) for case, m in found.items()} for name, found in results.items()},
    )


def _raw(found: Measured | str) -> Any:
    return found if isinstance(found, str) else asdict(found)


def _loops(results: Results, extent: Extent) -> Table:
    def cell(found: Measured | str) -> str:
        if isinstance(found, str):
            return found
        return ("wrong answers: " if found.wrong else "") + f"{found.loop:.2f}"

    return Table(
        extent.title(f"Loop of {extent.steps} steps"),
        "Seconds of all steps of a picture, without encoders and VAE; taken once.",
        ["", *results],
        [
            [case.name, *(cell(found[case]) for found in results.values())]
            for case in extent.cases
            if case.batch == 1
        ],
    )


def _memory(results: Results, extent: Extent) -> Table:
    def cells(found: Measured | str) -> list[str]:
        if isinstance(found, str):
            return [found, ""]
        return [f"{found.peak / 1e9:.1f}", "" if found.distance is None else f"{found.distance:.1e}"]

    return Table(
        extent.title("Memory and distance"),
        f"Peak in GB while it computes (on a CPU, of the process); relative L2 distance of a step's answer to"
        f" that of {REFERENCE}. fp8 weights are those of bf16, rounded.",
        ["", *(f"{case.name}: {what}" for case in extent.cases for what in ("peak", "distance"))],
        [[name, *(cell for m in found.values() for cell in cells(m))] for name, found in results.items()],
    )


def _budgets(models: Path, extent: Extent, rounds: int) -> Table:
    """As on smaller cards: what may be allocated is capped, weights get the usual part of that."""
    rows = []
    for storage in ("bf16", "fp8"):
        component = _transformer(models / CHECKPOINT.format(storage))
        for budget in extent.budgets:
            with _capped(extent.device, budget * 1e9):
                size = int(PART_OF_GPU * budget * 1e9)
                found = _attempt(partial(_within, component, extent, size, rounds))
            cells = ["", found, ""] if isinstance(found, str) else found
            rows.append([storage, f"{budget:g} GB", *cells])
            print(*rows[-1], sep=", ", flush=True)
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
    library = ModelLibrary(_placement(extent.device, budget=budget, compiled=False))
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

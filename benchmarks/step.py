"""One step of the transformer: ours beside diffusers', on the same weights, once both answered alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peer
from benchmarks.report import Plot, Table
from benchmarks.timing import Times, groups_in_turn
from usoflow.execution.memory import kept_memory
from usoflow.models import int8
from usoflow.models.checkpoint import TensorFile
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import DTYPES, Placement

# Numbers that bf16 holds exactly, times 1000 too: diffusers rounds both to the dtype that it computes in.
SIGMA, GUIDANCE = 0.5, 4.0
TEXT_TOKENS, STYLE_TOKENS = 512, 192
QUICK_TEXT = 64  # tokens where it is only to be seen that everything runs
BOUNDS = {"fp32": 1e-4, "bf16": 3e-2, "int8": 5e-2}  # relative L2 distance of the two answers
PIXELS = 8  # per latent
IN_INT8 = "usoflow int8"
VARIANTS = 64  # of a compiled peer: each case in each dtype is one

Velocity = Callable[[Tensor, Tensor], Tensor]  # of a latent and sigma


@dataclass(frozen=True, slots=True)
class Case:
    """What is denoised: a picture, the sides of subject pictures, a style or none; in pixels."""

    name: str
    size: tuple[int, int]
    subjects: tuple[int, ...] = ()
    style: bool = False
    batch: int = 1
    text: int = TEXT_TOKENS

    @property
    def tokens(self) -> int:
        """All that attend to each other."""
        sides = [self.size, *((side, side) for side in self.subjects)]
        pictures = sum(height * width // (2 * PIXELS) ** 2 for height, width in sides)
        return self.text + STYLE_TOKENS * self.style + pictures


@dataclass(frozen=True)
class Inputs:
    """Random inputs of a case."""

    latent: Tensor
    text: Tensor
    pooled: Tensor
    references: Sequence[Tensor]
    style: Tensor | None


def cases(side: int, subject: int) -> list[Case]:
    """Those of a picture's size, with subjects of one size and twice that."""
    size = (side, side)
    return [
        Case("text", size),
        Case(f"+ subject {subject}", size, (subject,)),
        Case(f"+ subject {2 * subject}", size, (2 * subject,)),
        Case("+ style", size, style=True),
        Case(f"+ both ({subject})", size, (subject,), style=True),
    ]


def quick_cases() -> list[Case]:
    """Few tokens, all kinds of them."""
    size = (64, 64)
    return [
        Case("text", size, text=QUICK_TEXT),
        Case("+ both (64)", size, (64,), style=True, text=QUICK_TEXT),
    ]


def inputs_of(case: Case, flux: Flux, device: torch.device) -> Inputs:
    """Drawn on the CPU from one seed."""
    generator = torch.Generator().manual_seed(0)
    config = flux.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    height, width = (side // PIXELS for side in case.size)
    return Inputs(
        draw(case.batch, config.channels, height, width),
        draw(1, case.text, config.text_dim),
        draw(1, config.pooled_dim),
        [draw(1, config.channels, side // PIXELS, side // PIXELS) for side in case.subjects],
        draw(1, STYLE_TOKENS, config.hidden) if case.style else None,
    )


def our_velocity(flux: Flux, given: Inputs, dtype: torch.dtype) -> Velocity:
    """Steps, their `prepare` done."""
    with torch.inference_mode():
        prepared = flux.prepare(
            given.text, given.pooled, (given.latent.shape[-2], given.latent.shape[-1]),
            batch=len(given.latent), guidance=GUIDANCE, references=given.references, method="uxo",
            style=given.style, dtype=dtype,
        )  # fmt: skip
    return lambda x, sigma: flux(x, sigma, prepared)


def their_velocity(model: nn.Module, given: Inputs) -> Velocity:
    """Steps of the peer."""
    return peer.velocity(
        model, given.latent, given.text, given.pooled, guidance=GUIDANCE,
        references=given.references, style=given.style,
    )  # fmt: skip


def ours(flux: Flux, given: Inputs, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One step."""
    velocity, sigma = our_velocity(flux, given, dtype), torch.tensor(SIGMA)
    return lambda: velocity(given.latent, sigma)


def theirs(model: nn.Module, given: Inputs) -> Callable[[], Tensor]:
    """One step of the peer."""
    velocity, sigma = their_velocity(model, given), torch.tensor(SIGMA)
    return lambda: velocity(given.latent, sigma)


def load(path: Path, dtype: str, *, eight_bits: bool = False) -> Flux:
    """The transformer as the library holds it for a run."""
    library = ModelLibrary(replace(Placement.choose("cpu", dtype), fastest=eight_bits))
    with torch.inference_mode():
        return library.flux(TensorFile.open(path).components()["flux"], (), "default")


class Contest:
    """The models that compete: each dtype's ours and theirs; theirs also compiled, if wanted.

    Where the CPU multiplies int8 and the file is stored in fp8, ours as that is computed by itself, too.
    """

    def __init__(self, path: Path, dtypes: Sequence[str], *, compiled: bool) -> None:
        self.ours: dict[str, tuple[Flux, torch.dtype]] = {}
        self.theirs: dict[str, nn.Module] = {}
        plain = load(path, "fp32")
        if int8.multiplied_here() and _in_fp8(path):
            self.ours[IN_INT8] = load(path, "bf16", eight_bits=True), torch.bfloat16
        for name in dtypes:
            dtype = DTYPES[name]
            self.ours[f"usoflow {name}"] = load(path, name), dtype
            model = peer.twin(plain, dtype)
            self.theirs[f"diffusers {name}"] = model
            if compiled:
                torch._dynamo.config.cache_size_limit = VARIANTS
                self.theirs[f"diffusers {name} compiled"] = torch.compile(model, dynamic=False)  # type: ignore[assignment]

    def run(self, case: Case, rounds: int) -> Times:
        """Let each answer once; check the answers; measure."""
        given = inputs_of(case, next(iter(self.ours.values()))[0], torch.device("cpu"))
        our_ways = {name: ours(flux, given, dtype) for name, (flux, dtype) in self.ours.items()}
        their_ways = {name: theirs(model, given) for name, model in self.theirs.items()}
        with torch.inference_mode():
            answers = {name: way() for name, way in (our_ways | their_ways).items()}
        for name in our_ways:
            require_agreement(answers, name, case)
        return groups_in_turn([(our_ways, kept_memory), (their_ways, nullcontext)], rounds)


def _in_fp8(path: Path) -> bool:
    """Whether matrices are stored so."""
    component = TensorFile.open(path).components()["flux"]
    return component.tensors["double_blocks.0.img_mlp.0.weight"].dtype == "F8_E4M3"


def require_agreement(answers: Mapping[str, Tensor], name: str, case: Case) -> None:
    """Same weights, same inputs, same answer; else there is nothing to compare."""
    dtype = name.removeprefix("usoflow ")
    peer_name = f"diffusers {dtype}" if name != IN_INT8 else "diffusers fp32"
    found, expected = answers[name].double(), answers[peer_name].double()
    distance = float((found - expected).norm() / expected.norm())
    if not distance < BOUNDS[dtype]:
        raise SystemExit(f"{case}: {name} is {distance:.2g} from {peer_name}.")


def tables(path: Path, rounds: int, *, quick: bool) -> Iterator[Table]:
    """A table for each size."""
    contest = Contest(path, ["bf16", "fp32"], compiled=not quick)
    wanted = {64: quick_cases()} if quick else {side: cases(side, 512) for side in (256, 512)}
    for side, those in wanted.items():
        found = {case: contest.run(case, rounds) for case in those}
        yield _table(side, found, rounds)


def _table(side: int, found: Mapping[Case, Times], rounds: int) -> Table:
    names = list(next(iter(found.values())).seconds)
    pairs = [("usoflow fp32", "diffusers fp32"), ("usoflow bf16", "diffusers bf16")]
    fastest = names[0]  # what a run takes by itself
    pairs += [(fastest, "diffusers bf16")] * (fastest == IN_INT8) + [(fastest, "diffusers fp32")]
    rows = [
        [
            case.name, str(case.tokens), *(f"{times.median(name):.2f}" for name in names),
            *(f"{times.speedup(*pair):.2f}x" for pair in pairs),
        ]
        for case, times in found.items()
    ]  # fmt: skip
    raw: dict[str, Any] = {case.name: dict(times.seconds) for case, times in found.items()}
    return Table(
        f"DiT step, {side}x{side}",
        "Full width, 1 double and 1 single block, stored in fp8, the same numbers for all; seconds; medians"
        f" of {rounds} rounds, in which all of ours and all of theirs take turns, each side after a step of"
        " its first that is not measured. The last columns say how many times faster usoflow is (median of"
        " the ratios within a round, eager).",
        ["", "tokens", *names, *(f"{_short(a)} : {b}" for a, b in pairs)],
        rows,
        raw=raw,
        plots={f"step-{side}": _plot(found, names)},
    )


def _short(name: str) -> str:
    return name.removeprefix("usoflow ")


def _plot(found: Mapping[Case, Times], names: Sequence[str]) -> Plot:
    cases = sorted(found, key=lambda case: case.tokens)
    tokens = [float(case.tokens) for case in cases]
    lines = {name: (tokens, [found[case].median(name) for case in cases]) for name in names}
    return Plot("tokens", "seconds of a step", lines, logarithmic=True)

"""How the cost of a step grows with tokens, references and batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.report import Plot, Table
from benchmarks.step import QUICK_TEXT, TEXT_TOKENS, Case, Contest
from benchmarks.timing import Times

QUICK_SIZES = ((64, 64), (128, 128))
SIZES = ((256, 512), (512, 768), (768, 832), (896, 1024), (1024, 1408))  # 1k to 6k tokens with 512 of text
REFERENCES = range(5)
BATCHES = (1, 2, 4, 8)


def tables(path: Path, rounds: int, *, quick: bool) -> Iterator[Table]:
    """Tokens, references, batch."""
    contest = Contest(path, ["bf16"], compiled=False)
    sizes, text = (QUICK_SIZES, QUICK_TEXT) if quick else (SIZES, TEXT_TOKENS)
    by_tokens = [Case(f"{height}x{width}", (height, width), text=text) for height, width in sizes]
    yield _table("tokens", by_tokens, [case.tokens for case in by_tokens], contest, rounds)
    side = 64 if quick else 256
    count = 2 if quick else len(REFERENCES)
    by_references = [
        Case(f"references: {n}", (side, side), (side,) * n, text=text) for n in REFERENCES[:count]
    ]
    tokens = [case.tokens for case in by_references]
    yield _table("references", by_references, tokens, contest, rounds)
    batches = BATCHES[:2] if quick else BATCHES
    by_batch = [Case(f"batch {n}", (side, side), batch=n, text=text) for n in batches]
    yield _table("batch", by_batch, list(batches), contest, rounds)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, seconds)]).slope


def _table(what: str, cases: Sequence[Case], sizes: Sequence[int], contest: Contest, rounds: int) -> Table:
    found: Mapping[Case, Times] = {case: contest.run(case, rounds) for case in cases}
    names = list(next(iter(found.values())).seconds)
    medians = {name: [times.median(name) for times in found.values()] for name in names}
    grown = {name: exponent(sizes, seconds) for name, seconds in medians.items()}
    return Table(
        f"Growth with {what}",
        f"Seconds of a step, medians of {rounds}; fitted exponent over"
        f" {'the batch' if what == 'batch' else 'all tokens'}: "
        + ", ".join(f"{name} {power:.2f}" for name, power in grown.items())
        + ".",
        ["", "tokens", *names],
        [
            [case.name, str(case.tokens), *(f"{times.median(name):.2f}" for name in names)]
            for case, times in found.items()
        ],
        raw={"sizes": list(sizes), "seconds": medians, "exponents": grown},
        plots={
            f"growth-{what}": Plot(
                what if what == "batch" else "tokens",
                "seconds of a step",
                {name: (list(map(float, sizes)), seconds) for name, seconds in medians.items()},
                logarithmic=True,
            )
        },
    )

"""Measures what is asked for, prints tables, writes a report.

    python -m benchmarks step growth workflow full pocket easycache numerics lora gpu
    python -m benchmarks --quick all        # minutes: small sizes, to see that everything runs

From the root of the repository, in its environment (`make .venv/.installed-test`), on a machine that does
nothing else. `benchmarks/server.py`, `soak.py` and `startup.py` are commands of their own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from benchmarks import fast_paths, full_size, gpu, growth, lora, pocket, step, synthetic, workflow
from benchmarks.report import Table, machine, write

SHALLOW = "checkpoints/flux1-dev-bf16.safetensors"


def main() -> None:
    """Parse, measure, print, write."""
    options = _options()
    warnings.filterwarnings("ignore", module="diffusers")
    if options.threads:
        torch.set_num_threads(options.threads)
    where, found = machine(), list[Table]()
    names = list(SECTIONS) if "all" in options.sections else options.sections
    for name in names:
        for table in SECTIONS[name](options):
            print(table.markdown(), flush=True)
            found.append(table)
            write(options.out, found, where, f"python -m benchmarks {' '.join(sys.argv[1:])}")
    print(f"Written: {options.out / 'report.md'}, report.json")


def _steps(options: argparse.Namespace) -> Iterator[Table]:
    with _shallow(options, "F8_E4M3") as models:
        yield from step.tables(models / SHALLOW, options.rounds, quick=options.quick)


def _growth(options: argparse.Namespace) -> Iterator[Table]:
    with _shallow(options, "BF16") as models:
        yield from growth.tables(models / SHALLOW, options.rounds, quick=options.quick)


def _workflow(options: argparse.Namespace) -> Iterable[Table]:
    return [workflow.table(options.scratch, quick=options.quick)]


def _full(options: argparse.Namespace) -> Iterable[Table]:
    return [full_size.table(options.scratch, quick=options.quick)]


def _pocket(options: argparse.Namespace) -> Iterator[Table]:
    yield from pocket.cold_and_warm(options.rounds)
    yield pocket.serve(options.rounds)


def _easycache(options: argparse.Namespace) -> Iterable[Table]:
    return [pocket.easycache(1 if options.quick else 4)]


def _fast_paths(options: argparse.Namespace) -> Iterable[Table]:
    return [fast_paths.table(1 if options.quick else 4)]


def _lora(options: argparse.Namespace) -> Iterable[Table]:
    return [lora.table(options.rounds, quick=options.quick)]


def _gpu(options: argparse.Namespace) -> Iterator[Table]:
    yield from gpu.tables(options.scratch, options.rounds, quick=options.quick, only=options.only)


SECTIONS: Mapping[str, Callable[[argparse.Namespace], Iterable[Table]]] = {
    "step": _steps,
    "growth": _growth,
    "workflow": _workflow,
    "full": _full,
    "pocket": _pocket,
    "easycache": _easycache,
    "numerics": _fast_paths,
    "lora": _lora,
    "gpu": _gpu,
}


def _shallow(options: argparse.Namespace, dtype: str) -> AbstractContextManager[Path]:
    return synthetic.written({SHALLOW: synthetic.transformer(synthetic.SHALLOW, dtype)}, options.scratch)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "all"], help="what to measure")
    parser.add_argument("--rounds", type=int, help="rounds, in each of which every competitor has its turn")
    parser.add_argument("--threads", type=int, help="of torch; default as torch chooses")
    parser.add_argument("--quick", action="store_true", help="small sizes and 1 round, to see that it runs")
    parser.add_argument(
        "--only", nargs="+", choices=gpu.COMPETITORS, default=gpu.COMPETITORS, help="of the section gpu"
    )
    parser.add_argument("--scratch", type=Path, help="folder for model files of up to 36 GB")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder of the report")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


if __name__ == "__main__":
    main()

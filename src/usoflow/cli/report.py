"""What `usoflow run` and `usoflow generate` say: progress while they run, results and timings after."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    from usoflow.api.result import Result
    from usoflow.execution.progress import Event, Listener

MENTIONED_SECONDS = 0.05  # faster nodes are summed up in one line
SAID_EVERY = 30.0  # seconds between two lines about a run, where there is no terminal
GB = 1e9


def say(line: str, colour: str | None = None) -> None:
    """A line to stderr, in colour where a terminal has it and nobody asked for none (https://no-color.org).

    Where it cannot be written, as on a full disk, what the command does goes on.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    try:
        typer.secho(line, fg=colour, err=True, color=False if plain else None)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """What is left of a stream cannot be written either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(lines: Iterable[str]) -> None:
    """Warnings, to stderr."""
    for line in lines:
        say(f"warning: {line}", "yellow")


def error_record(error: UsoflowError) -> dict[str, Any]:
    """What went wrong, for --json, and the pictures that there are all the same."""
    record = {"code": error.code, "detail": error.detail, "remedy": error.remedy}
    return record | ({"images": list(map(str, error.paths))} if error.paths else {})


@contextmanager
def progress(*, quiet: bool) -> Iterator[Listener]:
    """A listener that draws a bar on a terminal's stderr; where there is none a long run says now and then
    how far it is. If quiet, it does nothing.
    """
    if quiet:
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from usoflow.execution.progress import NodeProgress, NodeStarted

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=console, transient=True)
    bar.disable = not console.is_interactive
    said = time.monotonic()
    with bar:
        task = bar.add_task("", total=1, rate="")

        def listen(event: Event) -> None:
            nonlocal said
            if isinstance(event, NodeStarted):
                bar.reset(task, description=event.class_type, total=1, rate="")
            elif isinstance(event, NodeProgress):
                elapsed = bar.tasks[0].elapsed or 0.0
                rate = f"{elapsed / event.step:.2f} s/step"
                bar.update(task, completed=event.step, total=event.steps, rate=rate)
                if bar.disable and time.monotonic() - said > SAID_EVERY:
                    said = time.monotonic()
                    step = f"{bar.tasks[0].description} {event.step}/{event.steps}"
                    say(f"{step}, {rate}")

        yield listen


def as_text(result: Result) -> str:
    """Files first, one a line; then seed, time and memory, and the same for each node that took time."""
    summary = [f"{result.seconds:.1f} s", _memory(max((n.peak_bytes for n in result.nodes), default=0))]
    summary += [f"seed {seed}" for seed in result.seeds] + [f"{result.device} {result.dtype}"]
    lines = [*map(from_here, result.paths), " · ".join(summary)]
    slow = [node for node in result.nodes if node.seconds >= MENTIONED_SECONDS]
    rest = sum(node.seconds for node in result.nodes if node.seconds < MENTIONED_SECONDS)
    width = max((len(f"{node.class_type} {node.node_id}") for node in slow), default=0)
    for node in slow:
        name = f"{node.class_type} {node.node_id}"
        lines.append(f"  {name:<{width}}  {node.seconds:8.2f} s  {_memory(node.peak_bytes):>12}")
    lines.append(f"  {'other nodes':<{width}}  {rest:8.2f} s")
    lines += [
        f"  node {key} shows {name}: {json.dumps(value, ensure_ascii=False)}"
        for key, shown in result.shown.items()
        for name, value in shown.other.items()
    ]
    return "\n".join(lines)


def from_here(path: Path) -> str:
    """As one would write it in the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def as_record(result: Result) -> dict[str, Any]:
    """The same for programs."""
    return {
        "images": [str(path) for path in result.paths],
        "seeds": list(result.seeds),
        "seconds": round(result.seconds, 3),
        "device": result.device,
        "dtype": result.dtype,
        "nodes": [
            {
                "id": node.node_id,
                "class_type": node.class_type,
                "seconds": round(node.seconds, 4),
                "peak_bytes": node.peak_bytes,
            }
            for node in result.nodes
        ],
        "outputs": {key: shown.record() for key, shown in result.shown.items()},
        "warnings": list(result.warnings),
    }


def _memory(count: int) -> str:
    return f"peak {count / GB:.2f} GB"

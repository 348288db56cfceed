"""What `usoflow run` says: progress while it runs, results and timings after, validation errors before."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    from pathlib import Path

    from usoflow.execution.executor import RunResult
    from usoflow.execution.progress import Event, Listener
    from usoflow.models.placement import Placement
    from usoflow.schema.validation import ValidationResult
    from usoflow.settings import Folders
    from usoflow.workflow.prompt import Prompt

MENTIONED_SECONDS = 0.05  # faster nodes are summed up in one line
GB = 1e9


def warn(lines: Iterable[str]) -> None:
    """Warnings, to stderr."""
    for line in lines:
        typer.secho(f"warning: {line}", fg="yellow", err=True)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Listener]:
    """A listener that draws a bar on a terminal's stderr; says nothing where there is none or if quiet."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from usoflow.execution.progress import NodeProgress, NodeStarted

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=console, transient=True)
    bar.disable = quiet or not console.is_terminal
    with bar:
        task = bar.add_task("", total=1, rate="")

        def listen(event: Event) -> None:
            if isinstance(event, NodeStarted):
                bar.reset(task, description=event.class_type, total=1, rate="")
            elif isinstance(event, NodeProgress):
                elapsed = bar.tasks[0].elapsed or 0.0
                rate = f"{elapsed / event.step:.2f} s/step"
                bar.update(task, completed=event.step, total=event.steps, rate=rate)

        yield listen


def as_text(
    result: RunResult, prompt: Prompt, folders: Folders, placement: Placement, warnings: tuple[str, ...]
) -> str:
    """Files first, one a line; then seed, time and memory, and the same for each node that took time."""
    summary = [f"{result.seconds:.1f} s", _memory(max((n.peak_bytes for n in result.finished), default=0))]
    summary += [f"seed {seed}" for seed in _seeds(prompt)] + [_computed_on(placement)]
    lines = [*map(str, pictures(result, folders)), " · ".join(summary)]
    slow = [node for node in result.finished if node.seconds >= MENTIONED_SECONDS]
    rest = sum(node.seconds for node in result.finished if node.seconds < MENTIONED_SECONDS)
    width = max((len(f"{node.class_type} {node.node_id}") for node in slow), default=0)
    for node in slow:
        name = f"{node.class_type} {node.node_id}"
        lines.append(f"  {name:<{width}}  {node.seconds:8.2f} s  {_memory(node.peak_bytes):>12}")
    lines.append(f"  {'other nodes':<{width}}  {rest:8.2f} s")
    return "\n".join(lines)


def as_json(
    result: RunResult, prompt: Prompt, folders: Folders, placement: Placement, warnings: tuple[str, ...]
) -> str:
    """The same for programs."""
    record = {
        "images": [str(path) for path in pictures(result, folders)],
        "seeds": _seeds(prompt),
        "seconds": round(result.seconds, 3),
        "device": placement.device.type,
        "dtype": _dtype(placement),
        "nodes": [
            {
                "id": node.node_id,
                "class_type": node.class_type,
                "seconds": round(node.seconds, 4),
                "peak_bytes": node.peak_bytes,
            }
            for node in result.finished
        ],
        "warnings": list(warnings),
    }
    return json.dumps(record)


def pictures(result: RunResult, folders: Folders) -> list[Path]:
    """Paths of what output nodes wrote."""
    roots = {"output": folders.output, "temp": folders.temp}
    return [
        roots[image.type] / image.subfolder / image.filename
        for shown in result.shown.values()
        for image in shown.images
    ]


def validation_error(checked: ValidationResult) -> UsoflowError:
    """The error of a prompt of which nothing can be run: every reason, and what to do about it."""
    assert checked.error is not None
    lines = list(validation_lines(checked)) or [_sentence(checked.error)]
    remedies = dict.fromkeys(_remedies(checked))
    return UsoflowError(_code(checked), "\n".join(lines), remedy="\n".join(remedies) or None)


def _code(checked: ValidationResult) -> str:
    """What is missing decides about the exit code: a picture if that is all, a model if any is."""
    errors = list(_errors(checked))
    if errors and all(error["type"] == "custom_validation_failed" for error in errors):
        return "image_missing"
    return "model_missing" if any("remedy" in error["extra_info"] for error in errors) else "prompt_invalid"


def validation_lines(checked: ValidationResult) -> Iterator[str]:
    """One line for each thing that is wrong: node, input, reason."""
    for node_id, entry in checked.node_errors.items():
        for error in entry["errors"]:
            yield f"{entry['class_type']} (node {node_id}): {_sentence(error)}"


def _errors(checked: ValidationResult) -> Iterator[dict[str, Any]]:
    for entry in checked.node_errors.values():
        yield from entry["errors"]


def _remedies(checked: ValidationResult) -> Iterator[str]:
    for node_id, entry in checked.node_errors.items():
        for error in entry["errors"]:
            if remedy := error["extra_info"].get("remedy"):
                yield remedy
                yield f"Another file is named with --set {node_id}.{error['extra_info']['input_name']}=NAME."
            elif error["type"] == "custom_validation_failed" and entry["class_type"] == "LoadImage":
                yield f"Give the picture with --image {node_id}=PATH, or its folder with --input DIR."
    if checked.error and checked.error["type"] == "invalid_prompt":
        yield "Bypass or replace this node in the editor; `usoflow nodes` lists those that there are."


def _sentence(error: dict[str, Any]) -> str:
    details = f": {error['details']}" if error["details"] else ""
    return f"{error['message']}{details}"


def _seeds(prompt: Prompt) -> list[int]:
    values = (node.inputs.get(name) for node in prompt.nodes.values() for name in ("seed", "noise_seed"))
    return list(dict.fromkeys(value for value in values if isinstance(value, int)))


def _computed_on(placement: Placement) -> str:
    return f"{placement.device.type} {_dtype(placement)}"


def _dtype(placement: Placement) -> str:
    return str(placement.dtype).removeprefix("torch.")


def _memory(count: int) -> str:
    return f"peak {count / GB:.2f} GB"

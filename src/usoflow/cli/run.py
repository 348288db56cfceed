"""`usoflow run`: a workflow file in, pictures out."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    from usoflow.execution.executor import RunResult
    from usoflow.execution.progress import Cancellation, Listener
    from usoflow.models.placement import Placement
    from usoflow.settings import Folders
    from usoflow.workflow.prompt import Prompt


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Dtype(StrEnum):
    """In which number format the transformer computes."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def run(
    file: Annotated[
        str, typer.Argument(help="Workflow or prompt JSON, a PNG or WebP with one, or template:NAME.")
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NODE.INPUT=VALUE", help="Set an input; NODE is an id, title or type."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="NODE=PATH", help="Give a LoadImage node this picture."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every sampler.", min=0, max=2**64 - 1)] = None,
    inputs: Annotated[Path | None, typer.Option("--input", help="Folder of input pictures.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for results; ./output if not given.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="A ComfyUI folder or its models folder; else USOFLOW_MODELS.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the transformer.")] = Dtype.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, and no progress.")] = False,
) -> None:
    """Run a workflow and save its pictures."""
    from usoflow.cli import report
    from usoflow.nodes import registry
    from usoflow.settings import find_folders
    from usoflow.workflow.loading import load

    loaded = load(file, registry())
    prompt, given = _with_images(loaded.prompt, images or [])
    for assignment in assignments or []:
        prompt = prompt.assign(assignment)
    prompt = prompt if seed is None else _with_seed(prompt, seed)
    beside = None if file.startswith("template:") else Path(file)
    folders = find_folders(models=models, inputs=inputs, beside=beside, output=output, given_images=given)
    job = _checked(prompt, folders, loaded.workflow, loaded.warnings)
    report.warn(job.warnings)
    placement = _placement(device, dtype)  # imports torch: everything that can be refused has been
    with report.progress(quiet=as_json) as listen:
        result = _execute(job, placement, listen)
    show = report.as_json if as_json else report.as_text
    print(show(result, job.prompt, folders, placement, job.warnings))


@dataclass(frozen=True)
class _Job:
    """What is to be run: a valid prompt and the output nodes that can be reached."""

    prompt: Prompt
    targets: tuple[str, ...]
    folders: Folders
    workflow: dict[str, Any] | None
    warnings: tuple[str, ...]


def _with_images(prompt: Prompt, images: list[str]) -> tuple[Prompt, dict[str, Path]]:
    """The prompt with its LoadImage nodes changed, and the pictures by the names that it now uses."""
    given: dict[str, Path] = {}
    for item in images:
        node, equals, path = item.partition("=")
        if not equals:
            raise UsoflowError("set_invalid", f"--image {item!r} is not NODE=PATH.")
        picture = Path(path).expanduser()
        if not picture.is_file():
            raise UsoflowError("image_missing", f"{picture} does not exist.", remedy="Check the path.")
        key = prompt.find(node)
        taken = [entry.inputs.get("image") for other, entry in prompt.nodes.items() if other != key]
        name = _free_name(picture.name, taken)
        given[name] = picture
        prompt = prompt.set(key, "image", name)
    return prompt, given


def _free_name(name: str, taken: Container[object]) -> str:
    """The name, with a number before it if other nodes use it for another picture."""
    numbered = (f"{number}_{name}" for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in taken)


def _with_seed(prompt: Prompt, seed: int) -> Prompt:
    """The prompt with the seed of every sampler set; a seed that comes through a link stays."""
    for node_id, node in prompt.nodes.items():
        for name in ("seed", "noise_seed"):
            if isinstance(node.inputs.get(name), int):
                prompt = prompt.set(node_id, name, seed)
    return prompt


def _checked(
    prompt: Prompt, folders: Folders, workflow: dict[str, Any] | None, warnings: tuple[str, ...]
) -> _Job:
    from usoflow.catalogue import missing_file_remedy
    from usoflow.cli.report import validation_error, validation_lines
    from usoflow.nodes import registry
    from usoflow.schema.validation import validate
    from usoflow.workflow.prompt import Prompt

    def remedy(folder: str, name: str) -> str:
        return missing_file_remedy(folder, name, folders)

    checked = validate(prompt.to_json(), registry(), folders, remedy=remedy)
    if checked.error is not None:
        raise validation_error(checked)
    skipped = tuple(f"left out: {line}" for line in validation_lines(checked))
    return _Job(Prompt.parse(checked.prompt), checked.outputs, folders, workflow, warnings + skipped)


def _placement(device: Device, dtype: Dtype) -> Placement:
    from usoflow.models.placement import Placement

    return Placement.choose(device.value, dtype.value)


def _execute(job: _Job, placement: Placement, listen: Listener) -> RunResult:
    from usoflow.execution.executor import Executor
    from usoflow.execution.progress import Cancellation
    from usoflow.models.library import ModelLibrary
    from usoflow.nodes import registry

    executor, cancellation = Executor(registry(), ModelLibrary(placement)), Cancellation()
    with _stopped_by_interrupt(cancellation):
        return executor.run(
            job.prompt,
            job.targets,
            job.folders,
            workflow=job.workflow,
            listen=listen,
            cancellation=cancellation,
        )


@contextmanager
def _stopped_by_interrupt(cancellation: Cancellation) -> Iterator[None]:
    """Ctrl+C stops after the step in progress; a second one stops at once."""

    def stop(*_: object) -> None:
        cancellation.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

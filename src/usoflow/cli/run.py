"""`usoflow run`: a workflow file in, pictures out."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from usoflow.cli import report
from usoflow.cli.options import (
    AsJson,
    Compiled,
    CustomNodes,
    Device,
    Dtype,
    InDtype,
    Input,
    Models,
    OnDevice,
    Output,
    Vram,
    WorkflowFile,
)
from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    from usoflow.api.checking import Job
    from usoflow.api.engine import Engine
    from usoflow.api.result import Result
    from usoflow.execution.progress import Cancellation


def run(
    file: WorkflowFile,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NODE.INPUT=VALUE ...", help="Set an input; NODE is an id, title or type."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="NODE=PATH ...", help="Give a LoadImage node this picture."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every sampler.", min=0, max=2**64 - 1)] = None,
    inputs: Input = None,
    output: Output = None,
    models: Models = None,
    custom_nodes: CustomNodes = None,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.auto,
    vram: Vram = None,
    compiled: Compiled = None,
    as_json: AsJson = False,
) -> None:
    """Run a workflow and save its pictures.

    With the file first, options that show ... take several words: --set a.steps=4 b.cfg=2.
    """
    from usoflow.api.engine import Engine

    with redirect_stdout(sys.stderr):  # what custom nodes print is not the result
        engine = Engine(
            models=models,
            inputs=inputs,
            output=output,
            device=device.value,
            dtype=dtype.value,
            vram=vram,
            compiled=compiled,
            custom_nodes=custom_nodes,
        )
        workflow = engine.load(file)
        for item in images or []:
            node, equals, path = item.partition("=")
            if not equals or not path:
                what = f"--image {item!r} is not NODE=PATH."
                raise UsoflowError("set_invalid", what, remedy="Write --image NODE=PATH.")
            workflow = workflow.with_picture(node, path)
        for assignment in assignments or []:
            workflow = workflow.assign(assignment)
        workflow = workflow if seed is None else workflow.with_seed(seed)
        job = engine.check(workflow)
        report.warn(job.warnings)
        with stopped_by_interrupt() as cancellation:
            result = execute(engine, job, cancellation, quiet=as_json)
    print(json.dumps(report.as_record(result)) if as_json else report.as_text(result))


def execute(engine: Engine, job: Job, cancellation: Cancellation, *, quiet: bool) -> Result:
    """Run with a progress bar on stderr (none if quiet)."""
    with report.progress(quiet=quiet) as listen:
        engine.start()  # imports torch: everything that can be refused has been
        return engine.run(job, progress=listen, cancellation=cancellation)


@contextmanager
def stopped_by_interrupt() -> Iterator[Cancellation]:
    """Ctrl+C stops after the block in progress, or a part of other work; a second one ends the process."""
    from usoflow.execution.progress import Cancellation

    cancellation = Cancellation()

    def stop(*_: object) -> None:
        cancellation.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait for what torch is doing
        with suppress(OSError):  # print could be interrupted by itself
            os.write(2, b"Stopping; Ctrl+C once more ends it at once.\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancellation
    finally:
        signal.signal(signal.SIGINT, before)

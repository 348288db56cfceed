"""`usoflow convert`: a workflow file in, the prompt that would be executed out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from usoflow.cli import report
from usoflow.cli.options import CustomNodes, WorkflowFile, node_types, path
from usoflow.errors import UsoflowError
from usoflow.settings import expanded


def convert(
    file: WorkflowFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", parser=path, help="Write to this file; - is stdout.")
    ] = None,
    custom_nodes: CustomNodes = None,
) -> None:
    """Print the prompt (API JSON) of a workflow."""
    from usoflow.api.saving import save
    from usoflow.workflow.loading import load

    loaded = load(file, node_types(custom_nodes))
    report.warn(loaded.warnings)
    text = json.dumps(loaded.prompt.to_json(), indent=2, ensure_ascii=False) + "\n"
    data = text.encode(errors="backslashreplace")  # a lone surrogate becomes JSON's own escape
    if output is None or str(output) == "-":
        sys.stdout.buffer.write(data)
        return
    if os.path.exists(output) and os.path.exists(source := expanded(file)) and output.samefile(source):
        what = f"{output} is the workflow itself, of which a prompt is only a part."
        raise UsoflowError("output_unwritable", what, remedy="Write the prompt to another file.")
    save(output, data)

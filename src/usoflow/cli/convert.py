"""`usoflow convert`: a workflow file in, the prompt that would be executed out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from usoflow.cli.options import CustomNodes, node_types
from usoflow.errors import UsoflowError


def convert(
    file: Annotated[
        str,
        typer.Argument(help="Workflow or prompt JSON, a PNG or WebP with one, template:NAME, or - (stdin)."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
    custom_nodes: CustomNodes = None,
) -> None:
    """Print the prompt (API JSON) of a workflow."""
    from usoflow.workflow.loading import load

    loaded = load(file, node_types(custom_nodes))
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    text = json.dumps(loaded.prompt.to_json(), indent=2, ensure_ascii=False) + "\n"
    data = text.encode(errors="backslashreplace")  # a lone surrogate becomes JSON's own escape
    if output is None:
        sys.stdout.buffer.write(data)
        return
    try:
        output.write_bytes(data)
    except OSError as reason:
        raise UsoflowError("output_unwritable", f"{output}: {reason}") from None

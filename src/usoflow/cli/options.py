"""Options that several commands share: the same words, the same meaning everywhere."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from usoflow.errors import UsoflowError
from usoflow.settings import expanded
from usoflow.training import LIBRARIES

if TYPE_CHECKING:
    from usoflow.schema.node import NodeRegistry


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


def named(text: str) -> str:
    """What names a file. An empty one, as of a shell's unset variable, would be the current folder."""
    if not text:
        raise typer.BadParameter("the path is empty.")
    return text


def path(text: str) -> Path:
    """A file or folder by its name. Who reads it tells if it cannot be read, with an exit code of its own."""
    return expanded(named(text))


WorkflowFile = Annotated[
    str,
    typer.Argument(
        parser=named, help="Workflow or prompt JSON, a PNG or WebP with one, template:NAME, or - (stdin)."
    ),
]


Models = Annotated[
    Path | None,
    typer.Option("--models", parser=path, help="A ComfyUI folder or its models folder; else USOFLOW_MODELS."),
]
Input = Annotated[
    Path | None,
    typer.Option(
        "--input", parser=path, help="Folder of input pictures; else USOFLOW_INPUT, ./input, ComfyUI's."
    ),
]
Output = Annotated[
    Path | None, typer.Option(parser=path, help="Folder for results; else USOFLOW_OUTPUT, ./output.")
]
CustomNodes = Annotated[
    Path | None, typer.Option(parser=path, help="Folder of your own nodes, as ComfyUI's custom_nodes.")
]
OnDevice = Annotated[Device, typer.Option(help="Where to compute.")]
InDtype = Annotated[
    Dtype,
    typer.Option(
        help="Number format of the transformer; auto multiplies fp8 weights in 8 bits where that is faster."
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for the transformer's weights, as 8GB; else part of what is free. On a CPU, RAM.",
    ),
]
Compiled = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the transformer's blocks from the second picture of a size on; default on CUDA only.",
    ),
]


def node_types(custom_nodes: Path | None) -> NodeRegistry:
    """The node types that there are; what custom nodes print while they are loaded is not the result.

    Raises:
        UsoflowError: `file_not_found` if their folder is not there.
    """
    from usoflow.nodes import registry
    from usoflow.nodes.custom_folder import with_custom

    with redirect_stdout(sys.stderr):
        return with_custom(registry(), custom_nodes)


def need_training() -> None:
    """Whether the libraries of the extra `train` are there.

    Raises:
        UsoflowError: `extra_missing`.
    """
    lacking = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UsoflowError(
            "extra_missing", f"Not installed: {', '.join(lacking)}.", remedy='pip install "usoflow[train]"'
        )


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no progress.")]

"""Options that several commands share: the same words, the same meaning everywhere."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from usoflow.errors import UsoflowError


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


Models = Annotated[
    Path | None,
    typer.Option("--models", help="A ComfyUI folder or its models folder; else USOFLOW_MODELS."),
]
Input = Annotated[Path | None, typer.Option("--input", help="Folder of input pictures.")]
Output = Annotated[Path | None, typer.Option(help="Folder for results; ./output if not given.")]
CustomNodes = Annotated[
    Path | None, typer.Option(help="Folder of your own nodes, as ComfyUI's custom_nodes.")
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


def need_training() -> None:
    """Whether the libraries of the extra `train` are there.

    Raises:
        UsoflowError: `extra_missing`.
    """
    lacking = [name for name in ("cv2", "resvg_py", "matplotlib") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UsoflowError(
            "extra_missing", f"Not installed: {', '.join(lacking)}.", remedy='pip install "usoflow[train]"'
        )


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no progress.")]

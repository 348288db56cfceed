"""`usoflow train`: make the pocket models, or others of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from usoflow.cli.options import Device, need_training, path
from usoflow.errors import UsoflowError
from usoflow.settings import check_writable


def train(
    stage: Annotated[
        str,
        typer.Argument(
            help="render, vae, base, large, guided, tower, redraw, reward, content, style, subject,"
            " rewarded, package, judge, evaluate, uso-judge. Or all, in this order."
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(parser=path, help="Training file; default: the shipped one.")
    ] = None,
    work: Annotated[Path, typer.Option(parser=path, help="Folder for caches, states and sheets.")] = Path(
        "training"
    ),
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves it to torch.", min=0)] = 0,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the transformer's steps.")] = False,
    device: Annotated[Device, typer.Option(help="Where transformer and vision tower learn.")] = Device.auto,
    full_precision: Annotated[
        bool, typer.Option("--full-precision", help="Compute in fp32 instead of bf16.")
    ] = False,
) -> None:
    """Train the pocket models: a stage, or all; run again, one goes on from its last saved state.

    They learn from emoji drawings. FLUX.1 itself is taught by `python -m usoflow.training.full_size`.
    """
    need_training()
    check_writable(work, "--work")
    import torch

    from usoflow.models.placement import Placement
    from usoflow.training.loop import want_of_memory_told
    from usoflow.training.plan import Plan
    from usoflow.training.run import STAGES
    from usoflow.training.stages import Workshop

    if stage not in (*STAGES, "all"):
        raise UsoflowError(
            "training_config", f"There is no stage {stage!r}.",
            remedy=f"Stages are {', '.join(STAGES)}, and `all`.",
        )  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    dtype = torch.float32 if full_precision else torch.bfloat16
    workshop = Workshop(work, Plan.read(config), dtype, compiled, Placement.choose(device.value).device)
    with want_of_memory_told("Use a smaller batch in the training file, or --device cpu."):
        for name in STAGES if stage == "all" else (stage,):
            typer.echo(f"{name}: in {work}")
            STAGES[name](workshop)

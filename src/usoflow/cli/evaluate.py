"""`usoflow evaluate`: are the subject kept and the style applied? In numbers, for any model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from usoflow.cli.options import Device, Dtype, InDtype, Models, OnDevice, need_training, path


def evaluate(
    models: Models = None,
    work: Annotated[
        Path, typer.Option(parser=path, help="Work folder of `usoflow train`, with drawings.")
    ] = Path("training"),
    output: Annotated[Path, typer.Option(parser=path, help="Folder for tables and contact sheets.")] = Path(
        "evaluation"
    ),
    count: Annotated[int, typer.Option(help="Questions of each cell.", min=2)] = 200,
    size: Annotated[
        int, typer.Option(help="Side of the pictures, in pixels, a multiple of 16.", min=64)
    ] = 128,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.auto,
) -> None:
    """Measure the USO models of a folder on held-out subjects and styles, beside ceiling, cheat and chance.

    The drawings of the questions are fetched and rendered first, where the work folder has none.
    """
    need_training()
    if size % 16:
        raise typer.BadParameter(f"{size} is not a multiple of 16.", param_hint="--size")
    from usoflow.settings import check_writable, find_folders

    check_writable(output, "--output")
    if not work.is_dir():  # else it is only read
        check_writable(work, "--work")
    from usoflow.models.library import ModelLibrary
    from usoflow.models.placement import Placement
    from usoflow.training.plan import Plan
    from usoflow.training.stages import Workshop
    from usoflow.training.uso_evaluate import Contender
    from usoflow.training.uso_judge import shipped_uso_judge
    from usoflow.training.uso_report import evaluate as measure

    library = ModelLibrary(Placement.choose(device.value, dtype.value))
    contender = Contender.of(find_folders(models=models), library, side=size)
    typer.echo("Measured: " + ", ".join(map(str, contender.files)))
    workshop = Workshop(work, Plan.read(None))
    workshop.render()
    judge = shipped_uso_judge(workshop.world)
    measure(contender, judge, workshop.sprites, count=count, output=output, say=typer.echo)
    typer.echo(f"Tables and sheets: {output}")

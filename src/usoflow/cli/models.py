"""`usoflow models`: what is there, what is missing; `pull` gets it, `check` looks closely at a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from usoflow.cli.options import Models, path
from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    from usoflow.catalogue import KnownFile
    from usoflow.models.checkpoint import Component
    from usoflow.settings import Folders

app = typer.Typer(help="List, get and check model files.", add_completion=False)


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    models: Models = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List model files: contents, size, precision; and those of the tutorial that are missing."""
    context.obj = models  # for a subcommand that comes after the option
    if context.invoked_subcommand is not None:
        if as_json:
            raise typer.BadParameter(f"{context.invoked_subcommand} prints no JSON.", param_hint="--json")
        return
    from usoflow.catalogue import missing, pull_command
    from usoflow.models.inventory import found_files
    from usoflow.settings import find_folders, size_in_words

    folders = find_folders(models=models)
    found, lacking = list(found_files(folders)), missing(folders)
    if as_json:
        files = [asdict(file) | {"path": str(file.path)} for file in found]
        print(json.dumps({"files": files, "missing": [_record(file, folders) for file in lacking]}))
        return
    for file in found:
        print(f"{file.folder}/{file.name}  {size_in_words(file.bytes)}")
        print(f"  {file.problem or f'{file.contents} ({file.precision})'}\n  {file.path}")
    for known in lacking:
        print(f"missing: {known.folder}/{known.name}  {known.size}\n  {known.url}")
        print(f"  into {folders.models[known.folder][0]}\n  licence: {known.licence}")
    if lacking:
        print(f"`{pull_command(folders)}` gets what is missing.")


@app.command()
def pull(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="uso: the files of the tutorial.")] = "uso",
    models: Models = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the licences without being asked.")] = False,
) -> None:
    """Download what is missing of the tutorial's files, continuing what broke off."""
    from usoflow.api import download
    from usoflow.catalogue import missing
    from usoflow.settings import find_folders, named_models

    if what != "uso":
        advice = "`usoflow models pull` gets the files of the tutorial."
        raise UsoflowError("request_invalid", f"There is no set of files {what!r}, only uso.", remedy=advice)
    chosen = models or context.obj
    with _there(chosen or named_models()):
        folders = find_folders(models=chosen)
        wanted = missing(folders)
        for file in wanted:
            print(f"{file.name}  {file.size}\n  {file.url}\n  licence: {file.licence}")
            target = folders.models[file.folder][0] / file.name
            if kept := download.name_to_keep(target):
                print(f"  {target} holds something else: it is kept as {kept.name}")
            elif target.exists():
                print(f"  replaces {target}, which is damaged")
        if wanted and not yes:
            _confirm()
        for file in wanted:
            with _bar(file.name) as progress:
                written = download.pull(file, folders, progress)
            print(f"wrote {written}", flush=True)
    if not wanted:
        print("All files of the tutorial are there.")


@app.command()
def check(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(parser=path, help="A model file, safetensors or GGUF.")],
    transformer: Annotated[
        Path | None, typer.Option("--with", parser=path, help="The transformer that a LoRA is to fit.")
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor first: name, shape, format.")
    ] = False,
    models: Models = None,
) -> None:
    """Tell what a file is, and whether every tensor and value is as it must be."""
    from usoflow.models.checkpoint import TensorFile
    from usoflow.models.kinds import SINGLE_FILES
    from usoflow.settings import find_folders

    if os.path.isfile(file / "model_index.json"):
        what = f"{file} is a folder in the layout of diffusers."
        raise UsoflowError("model_kind", what, remedy=SINGLE_FILES)
    if not os.path.isfile(file):
        raise UsoflowError("file_not_found", f"{file} is not a file; give its whole path.")
    header = TensorFile.open(file)  # what it tells is told before torch is imported
    for name, info in header.tensors.items() if tensors else ():
        print(f"{name}  {list(info.shape)}  {info.dtype}")
    fitting = (
        _transformer(find_folders(models=models or context.obj))
        if transformer is None
        else _flux(transformer)
    )
    from usoflow.models.inspection import inspect

    for line in inspect(file, fitting):
        print(line, flush=True)


@contextmanager
def _there(folder: Path | None) -> Iterator[None]:
    """A folder that need not be there before; where nothing came into it, it is not there after, either."""
    made = [place for place in (folder, *folder.parents) if not place.exists()] if folder else []
    for place in reversed(made):
        place.mkdir()
    try:
        yield
    finally:
        with suppress(OSError):  # the first that holds something ends it
            for place in made:
                place.rmdir()


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.disable = not bar.console.is_interactive
    with bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise UsoflowError(
            "licence_declined",
            "The licences must be agreed to, and there is no terminal to ask on.",
            remedy="Add --yes to agree.",
        )
    try:
        answer = input("Do you agree to these licences? [y/N]: ")
    except EOFError:  # Ctrl+D
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UsoflowError("licence_declined", "The licences were not agreed to.")


def _flux(path: Path) -> Component:
    from usoflow.models.checkpoint import TensorFile

    return TensorFile.open(path).component("flux")


def _transformer(folders: Folders) -> Component | None:
    """The first transformer among the models that can be run."""
    from usoflow.models.flux_config import runs

    for folder in ("checkpoints", "diffusion_models"):
        for name in folders.list(folder):
            try:
                found = _flux(folders.model(folder, name))
            except UsoflowError:  # another model, or a damaged file
                continue
            if runs(found):
                return found
    return None


def _record(file: KnownFile, folders: Folders) -> dict[str, Any]:
    return {
        "folder": str(folders.models[file.folder][0]),
        "name": file.name,
        "url": file.url,
        "size": file.size,
        "licence": file.licence,
    }

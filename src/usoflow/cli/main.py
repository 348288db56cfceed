"""The `usoflow` command: verbs, and how errors look. Each verb imports what it needs when it runs."""

from __future__ import annotations

import io
import json
import logging
import sys

import typer

from usoflow.cli.convert import convert
from usoflow.cli.doctor import doctor
from usoflow.cli.evaluate import evaluate
from usoflow.cli.generate import Generate, generate
from usoflow.cli.models import app as models
from usoflow.cli.nodes import nodes
from usoflow.cli.report import error_record
from usoflow.cli.run import run
from usoflow.cli.serve import serve
from usoflow.cli.train import train
from usoflow.errors import UsoflowError

HELP = """USO style and subject generation on FLUX.1: runs ComfyUI's official USO workflows.

Exit codes: 0 done · 2 wrong command, option or path · 3 workflow not readable or not valid ·
4 model file missing or not usable · 5 input picture missing or not usable ·
6 the run failed (memory, disk, values that are not finite) · 130 stopped."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(run)
app.command(cls=Generate)(generate)
app.command()(convert)
app.command()(nodes)
app.add_typer(models, name="models")
app.command()(doctor)
app.command()(serve)
app.command()(train)
app.command()(evaluate)


def main() -> None:
    """Entry point: a user's mistake is an error with a remedy and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe or an old console may lack a character
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("usoflow").setLevel(logging.INFO)
    try:
        app()
    except UsoflowError as error:
        _show(error)
        sys.exit(error.exit_code)


def _show(error: UsoflowError) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": error_record(error)}))
        return
    typer.secho(f"error: {error.detail}", fg="red", err=True)
    typer.secho(error.remedy, err=True)

"""The `usoflow` command: verbs, and how errors look. Each verb imports what it needs when it runs."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import traceback
from typing import Annotated, Any

import typer

from usoflow.cli import report
from usoflow.cli.convert import convert
from usoflow.cli.doctor import doctor
from usoflow.cli.evaluate import evaluate
from usoflow.cli.generate import Generate, generate
from usoflow.cli.models import app as models
from usoflow.cli.nodes import nodes
from usoflow.cli.run import run
from usoflow.cli.serve import serve
from usoflow.cli.train import train
from usoflow.cli.words import SeveralWords
from usoflow.errors import EXIT_CANCELLED, UsoflowError
from usoflow.version import __version__

HELP = """USO style and subject generation on FLUX.1: runs ComfyUI's official USO workflows.

Exit codes: 0 done · 2 wrong command, option or path · 3 workflow not readable or not valid ·
4 model file missing or not usable · 5 input picture missing or not usable ·
6 the run failed (memory, disk, values that are not finite) · 130 stopped."""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
DEFECTS = ("node_failed", "custom_node_failed")  # of usoflow's code, or of a custom node's
# How often a thread of torch's (libgomp's, on Linux) looks whether the others are done before it sleeps: µs
# in all. By default it is a ms, and while another program has one of the cores much of that is waited in vain
# after every operation: a picture took up to 20 times as long. Read when torch is loaded.
SPINS, SPIN_VARIABLES = "1000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer brings


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"usoflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command(cls=SeveralWords)(run)
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
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe or an old console may lack a character
            stream.reconfigure(errors="backslashreplace")
    if not any(name in os.environ for name in SPIN_VARIABLES):
        os.environ[SPIN_VARIABLES[0]] = SPINS
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("usoflow").setLevel(logging.INFO)
    try:
        _check_working_folder()
        status = _run_command()
        sys.stdout.flush()
        sys.exit(status)
    except UsoflowError as error:
        _show(error)
        sys.exit(error.exit_code)
    except OSError as error:
        refused = _refused_by_system(error)
        if refused is None:
            raise
        _show(refused, as_json=error.filename is not None)  # else there is nowhere to write it to
        sys.exit(refused.exit_code)


def _open_streams() -> None:
    """Those that a shell closed (`>&-`): what is written goes nowhere, and there is nothing to read."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _check_working_folder() -> None:
    """Torch would end the process where it is gone."""
    try:
        os.getcwd()
    except FileNotFoundError:
        what = "The folder that this command was started in is not there any more."
        raise UsoflowError("file_not_found", what, remedy="Change to one that is (cd).") from None


def _refused_by_system(error: OSError) -> UsoflowError | None:
    """What is wrong with a file or standard output; None for a defect of ours."""
    if error.filename is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # else most likely not for this user
        return UsoflowError(
            "output_unwritable" if full else "file_not_found",
            f"{error.filename}: {error.strerror}.",
            remedy=None if full else "Check the path and its permissions.",
        )
    if error.errno == errno.ENOSPC:
        report.discard(sys.stdout)
        return UsoflowError("output_unwritable", f"Standard output: {error.strerror}.")
    return None


def _run_command() -> int:
    """The exit code of a command; with --json what typer itself would tell is an error like others."""
    if not _wants_json():
        return int(app() or 0)
    try:
        status = int(app(standalone_mode=False) or 0)
    except UsageError as error:
        raise UsoflowError("command_invalid", error.format_message()) from None
    if status == EXIT_CANCELLED:  # Ctrl+C before a run could stop by itself
        raise UsoflowError("cancelled", "Stopped.")
    return status


def _wants_json() -> bool:
    return "--json" in sys.argv


def _show(error: UsoflowError, *, as_json: bool = True) -> None:
    if error.code in DEFECTS and error.__cause__ is not None:  # whoever mends it needs the place
        traceback.print_exception(error.__cause__)
    if as_json and _wants_json():
        try:
            print(json.dumps({"error": report.error_record(error)}), flush=True)
            return
        except OSError:  # nobody reads it, or the disk is full: the exit code and stderr remain
            report.discard(sys.stdout)
    try:
        for path in error.paths:
            print(report.from_here(path), flush=True)
    except OSError:
        report.discard(sys.stdout)
    report.say(f"error: {error.detail}", "red")
    report.say(error.remedy)

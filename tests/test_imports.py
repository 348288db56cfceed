"""What is imported when: torch takes a second, so whatever can do without it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "diffusers")


def imported(code: str) -> set[str]:
    """Heavy packages in a fresh interpreter after this code."""
    check = f"{code}\nimport sys; print('loaded:', *(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def command(*arguments: str) -> str:
    """Code that runs `usoflow ARGUMENTS`."""
    return f"""
import contextlib, sys
from usoflow.cli.main import main
sys.argv = ["usoflow", *{arguments!r}]
with contextlib.suppress(SystemExit):
    main()
"""


OBJECT_INFO = """
from pathlib import Path
from usoflow.nodes import registry
from usoflow.schema.object_info import render
from usoflow.settings import find_folders
for node in registry().values():
    assert render(node.schema, find_folders(models=Path(".")))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import usoflow",
        "import usoflow.errors, usoflow.settings, usoflow.catalogue, usoflow.models.checkpoint",
        OBJECT_INFO,
        command("--help"),
        command("nodes", "KSampler"),
        command("convert", "template:flux1_dev_uso_reference_image_gen"),
        command("run", "template:flux1_dev_uso_reference_image_gen"),  # refused: its files are missing
    ],
    ids=["package", "lower layers", "object_info", "help", "nodes", "convert", "refused run"],
)
def test_no_torch(code: str) -> None:
    assert imported(code) == set()


# What computes, in rooms that else do not: imported by the worker, or by nodes' functions when they run.
COMPUTING = ("usoflow.nodes.denoising", "usoflow.service.preview")


def test_rooms_without_torch() -> None:
    rooms = ("workflow", "schema", "nodes", "service", "server", "api", "cli")
    names = [f"usoflow.{room}" for room in rooms]
    code = f"""
import importlib, pkgutil
for room in {names!r}:
    package = importlib.import_module(room)
    for found in pkgutil.walk_packages(package.__path__, room + "."):
        if found.name not in {COMPUTING!r}:
            importlib.import_module(found.name)
"""
    assert imported(code) == set()


def test_the_probe_sees_torch() -> None:
    assert "torch" in imported("import usoflow.models.weights")


def test_oracles_are_never_imported_by_a_run() -> None:
    assert imported("import usoflow.execution.executor, usoflow.nodes.denoising") == {"torch"}

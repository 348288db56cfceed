"""Paths as a shell gives them: empty ones, `~`, links to nothing, files that may not be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shell import usoflow
from usoflow import Workflow

TEMPLATE = "template:flux1_dev_uso_reference_image_gen"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of whoever types the command, who is in another folder."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a cat", "--subject", ""),
        ("generate", "a cat", "--style", ""),
        ("generate", "a cat", "--save-workflow", ""),
        ("run", ""),
        ("run", TEMPLATE, "--image", "47="),
        ("convert", ""),
        ("convert", TEMPLATE, "-o", ""),
        ("models", "check", ""),
        ("evaluate", "--output", ""),
        ("serve", "--listen", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_refused(arguments: tuple[str, ...]) -> None:
    """As of a variable that is not set: it would be the folder that one is in, or every address."""
    done = usoflow(*arguments)
    assert done.code == 2
    assert "empty" in done.err or "NODE=PATH" in done.err


def test_the_home_folder_is_meant_everywhere(home: Path, small_models: Path) -> None:
    """Also where the shell leaves it to us: `--subject=~/a.png`, or in quotes."""
    shutil.copytree(small_models.parent / "input", home, dirs_exist_ok=True)
    (home / "a.safetensors").write_bytes(b"no model")
    options = ["--models", small_models, "--size=32x32", "--steps=1", "--subject-size=32", "--device=cpu"]
    pictures = ["--subject=~/subject.png", "--style=~/style.png", "--save-workflow=~/graph.json"]
    assert usoflow("generate", "a cat", *pictures, *options).code == 0
    assert usoflow("convert", "~/graph.json", "-o", "~/prompt.json").code == 0
    assert "nodes" in json.loads((home / "graph.json").read_text())
    assert json.loads((home / "prompt.json").read_text())
    assert usoflow("models", "check", "~/a.safetensors").code == 4


def test_who_reads_a_file_tells_that_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own exit code, and not the parser of the command line; which would ask as follows."""
    ask = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **how: mode != os.R_OK and ask(path, mode, **how))
    file = tmp_path / "unreadable"
    file.write_bytes(b"")
    assert usoflow("generate", "a cat", "--subject", file, "--keep-size").code == 5
    assert usoflow("models", "check", file).code == 4


@pytest.mark.parametrize(
    "command", [("generate", "a cat", "--device=cpu"), ("evaluate",)], ids=lambda c: c[0]
)
@pytest.mark.parametrize("place", ["link", "file/folder"])
def test_an_output_that_cannot_be_made_is_told_at_once(
    tmp_path: Path, small_models: Path, command: tuple[str, ...], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("begun")

    monkeypatch.setattr("usoflow.models.library.ModelLibrary.__init__", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    done = usoflow(*command, "--models", small_models, "--output", tmp_path / place)
    assert (done.code, done.out) == (2, "")
    assert "not a folder that can be written to" in done.err


@pytest.mark.parametrize("command", [("train", "render"), ("evaluate",)], ids=lambda c: c[0])
def test_a_work_folder_that_cannot_be_made_is_told_at_once(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Before 600 MB of drawings are fetched; no variable names it."""
    (tmp_path / "file").touch()
    done = usoflow(*command, "--work", tmp_path / "file")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("Make it one, or choose another with --work.\n")


def test_a_graph_is_not_lost_to_its_prompt(tmp_path: Path) -> None:
    graph = tmp_path / "graph.json"
    Workflow.load(TEMPLATE).save(graph)
    before = graph.read_bytes()
    (tmp_path / "same.json").symlink_to(graph)
    for output in (graph, tmp_path / "here" / ".." / "graph.json", tmp_path / "same.json"):
        done = usoflow("convert", graph, "-o", output)
        assert done.code == 2
        assert "is the workflow itself" in done.err
    assert graph.read_bytes() == before

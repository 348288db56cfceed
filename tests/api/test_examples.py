"""The examples run as they are written, on small models."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shell import usoflow
from usoflow.settings import POCKET_MODELS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_library(tmp_path: Path, small_models: Path) -> None:
    command = [sys.executable, EXAMPLES / "library.py", "--models", small_models, "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert "NodeProgress(node_id='112:31', step=3, steps=3)" in done.stdout


def test_inpainting_leaves_what_is_not_masked(tmp_path: Path, small_models: Path) -> None:
    """With a mask that is black everywhere the picture is what the VAE makes of it."""
    mask = Image.new("RGB", (64, 64), "black")
    mask.save(tmp_path / "black.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    arguments = ["--models", small_models, "--output", tmp_path, "--set=sampler.steps=2", "--dtype=fp32"]
    picture = small_models.parent / "input" / "style.png"
    found = {}
    for name in ("black", "white"):
        done = usoflow(
            "run", EXAMPLES / "inpaint.json", f"--image=picture={picture}",
            f"--image=mask={tmp_path / name}.png", "--json", *arguments,
        )  # fmt: skip
        assert done.code == 0, done.err
        with Image.open(json.loads(done.out)["images"][0]) as image:
            found[name] = np.asarray(image).astype(int)
    prompt = json.loads((EXAMPLES / "inpaint.json").read_text())
    plain = {key: prompt[key] for key in ("loader", "picture", "encode", "save")}
    plain["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["encode", 0], "vae": ["loader", 2]}}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    done = usoflow(
        "run", tmp_path / "plain.json", f"--image=picture={picture}", "--json", *arguments[:4], "--dtype=fp32"
    )
    with Image.open(json.loads(done.out)["images"][0]) as image:
        unchanged = np.asarray(image).astype(int)
    assert np.abs(found["black"] - unchanged).max() <= 1
    assert np.abs(found["white"] - unchanged).mean() > 5


def test_pictures_of_the_cookbook(tmp_path: Path, small_models: Path) -> None:
    """Each page gets its picture, and once, however often they are drawn; without USO some keep theirs."""
    pages = tmp_path / "cookbook"
    shutil.copytree(ROOT / "docs" / "cookbook", pages, ignore=shutil.ignore_patterns("*.png"))
    without = tmp_path / "models"
    shutil.copytree(small_models / "checkpoints", without / "checkpoints")
    for models, undrawn in ((small_models, 0), (without, 4)):
        command = [
            sys.executable,
            EXAMPLES / "cookbook.py",
            "--models",
            models,
            "--pages",
            pages,
            "--size=32",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(list(pages.glob("*.png"))) == 8
        assert done.stdout.count("not drawn") == undrawn
    for picture in pages.glob("*.png"):
        shown = [page for page in pages.glob("*.md") if f"]({picture.name})" in page.read_text()]
        assert len(shown) == 1
        assert shown[0].read_text().count(f"]({picture.name})") == 1


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in pages():
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text):
            name = "".join(target)
            if "://" not in name:
                assert (page.parent / name).exists(), f"{page.name}: {name}"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]


def test_commands_of_the_cookbook_have_options_that_there_are() -> None:
    text = "\n".join(page.read_text() for page in pages())
    offered = usoflow("generate", "--help").out + usoflow("run", "--help").out
    commands = re.findall(r"^usoflow (?:generate|run) .*?(?<!\\)$", text, re.MULTILINE | re.DOTALL)
    used = {option for command in commands for option in re.findall(r"(?<!\w)(--[a-z-]+)", command)}
    assert len(used) >= 10
    assert {option for option in used if option not in offered} == set()


def test_the_model_card_measured_the_files_that_are_shipped() -> None:
    """`usoflow evaluate` wrote docs/pocket/evaluation.json of these files, and the card has its figures."""
    measured = json.loads((ROOT / "docs" / "pocket" / "evaluation.json").read_text())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shipped_files()}
    assert measured["files"] == files
    assert measured["count"] >= 200
    card = (ROOT / "docs" / "pocket.md").read_text()
    cells = {
        "Subject-driven (": ("subject", ("subject", "background", "moved", "all")),
        "Style-driven, seen styles (": ("style seen", ("style", "subject", "background", "leaked")),
        "Style-driven, held-out styles (": ("style held out", ("style", "subject", "background", "leaked")),
        "Both, seen styles (": ("both", ("subject", "style", "background", "all")),
        "Both, held-out styles:": ("both, style held out", ("subject", "style", "background", "all")),
    }
    rows = {"**pocket USO**": "whole", "no LoRA": "no LoRA", "real target (ceiling)": "real target"}
    for heading, (cell, columns) in cells.items():
        table = card[card.index(heading) :]
        for said, row in rows.items():
            figures = table.split(f"| {said} |")[1].splitlines()[0].strip(" |").split(" | ")
            found = [f"{100 * measured[cell][row][column]:.1f}" for column in columns]
            assert figures == found, (cell, row)


def shipped_files() -> list[Path]:
    return [path for path in POCKET_MODELS.rglob("*.safetensors") if path.is_file()]


def test_the_first_figures_are_those_of_the_model_card() -> None:
    """README's of the pocket models are in the tables of docs/pocket.md."""
    said = re.search(
        r"100 subjects in (\d+) % .* asked for in (\d+) %\. .*"
        r"is kept in ([\d.]+) %, a style taken in ([\d.]+) %, both together in ([\d.]+) % "
        r"\(styles of their training; a new one is taken in (\d+) %\)",
        " ".join((ROOT / "README.md").read_text().split()),
    )
    assert said is not None
    card = (ROOT / "docs" / "pocket.md").read_text()
    places = (
        ("Text to image, ", "**pocket, guidance 3.5, cfg 1.7**", 0),
        ("Text to image, ", "**pocket, guidance 3.5, cfg 1.7**", 1),
        ("Subject-driven (", "**pocket USO**", 0),
        ("Style-driven, seen styles (", "**pocket USO**", 0),
        ("Both, seen styles (", "**pocket USO**", 3),
        ("Style-driven, held-out styles (", "**pocket USO**", 0),
    )
    for figure, (cell, name, column) in zip(said.groups(), places, strict=True):
        row = card[card.index(cell) :].split(f"| {name} |")[1].splitlines()[0]
        shown = row.split("|")[column].strip(" *%")
        assert float(figure) == (float(shown) if "." in figure else round(float(shown))), cell


def test_the_size_of_the_family_is_told() -> None:
    total = sum(path.stat().st_size for path in shipped_files())
    assert total <= 32e6
    assert f"the whole family has {total / 1e6:.1f} MB" in (ROOT / "docs" / "pocket.md").read_text()


@pytest.mark.parametrize("name", ["both", "style"])
def test_who_has_other_models_is_told_what_to_set(name: str, tmp_path: Path) -> None:
    """In one line, which is all that has to be added."""
    graph = Path(__file__).parents[2] / "examples" / f"{name}.json"
    options = ["--models", POCKET_MODELS, "--output", tmp_path, "--device=cpu"]
    refused = usoflow("run", graph, *options)
    assert refused.code == 4
    (line,) = re.findall(r"^To run it with the files you have, add: (--set .+)$", refused.err, re.MULTILINE)
    again = usoflow("run", graph, *options, *shlex.split(line))
    assert (again.code, "Custom validation failed" in again.err) == (5, True), again.err  # the pictures alone

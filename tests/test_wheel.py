"""The wheel: built, unpacked away from the sources, it runs with all of its data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import usoflow, pathlib
here = pathlib.Path(usoflow.__file__).parent
assert (here / "py.typed").is_file()
with usoflow.Engine(models=here / "pocket" / "models", output="out", device="cpu", dtype="fp32") as engine:
    result = engine.run(usoflow.Workflow.load({pocket!r}).set("KSampler.steps", 1))
print(here)
print(result.paths[0].resolve())
"""
pytestmark = pytest.mark.full  # it builds and unpacks 30 MB


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone; what it depends on is that of the tests."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", place, ROOT], check=True)
    (wheel,) = place.glob("usoflow-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", wheel], check=True)
    return place / "site"


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """Python with this usoflow instead of the one that is tested otherwise."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_draws_with_the_models_in_it(installed: Path, tmp_path: Path) -> None:
    pocket = str(ROOT / "examples" / "pocket.json")
    here, picture = run(installed, tmp_path, "-c", SCRIPT.format(pocket=pocket)).splitlines()
    assert Path(here) == installed / "usoflow"
    assert Path(picture).is_file()


def test_the_commands_are_there(installed: Path, tmp_path: Path) -> None:
    assert "KSampler" in run(installed, tmp_path, "-m", "usoflow", "nodes")
    prompt = run(
        installed, tmp_path, "-m", "usoflow", "convert", "template:flux1_dev_uso_reference_image_gen"
    )
    assert '"ReferenceLatent"' in prompt
    assert (installed / "bin" / "usoflow").is_file()

"""`make` where no environment can be made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROKEN = """#!/bin/sh
case "$*" in "-m venv"*) mkdir -p "$3/bin"; touch "$3/bin/python"; echo "no space" >&2; exit 1; esac
exec {python} "$@"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    """And half an environment is not taken for a whole one when it is tried again."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    python = tmp_path / "python"
    python.write_text(BROKEN.format(python=sys.executable))
    python.chmod(0o755)
    command = ["make", "-C", ROOT, f"VENV={tmp_path / 'mine'}", f"PYTHON={python}", "install"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "no space" in done.stderr
        assert "module is missing" not in done.stdout
        assert (tmp_path / "mine" / "thesis.txt").is_file()

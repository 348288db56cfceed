"""The house rules that can be counted: how long files and functions may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import usoflow

FILES = sorted(Path(usoflow.__file__).parent.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Name and length of each."""
    for found in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            yield found.name, (found.end_lineno or 0) - found.lineno + 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_files_and_functions_are_short(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= LONGEST_FILE
    assert [name for name, lines in functions(file) if lines > LONGEST_FUNCTION] == []

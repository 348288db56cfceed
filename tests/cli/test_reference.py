"""The reference in docs/ is that of the command line as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shell import usoflow
from usoflow.cli.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "python -m usoflow.cli.reference > docs/cli.md"


def test_every_command_is_there() -> None:
    listed = usoflow("--help").out
    commands = {line.split("`")[1].split()[1] for line in reference().splitlines() if line.startswith("## `")}
    assert {"run", "generate", "convert", "nodes", "models", "doctor"} <= commands
    assert {command for command in commands if command not in listed} == set()


@pytest.mark.parametrize("command", ["run", "generate", "convert", "models check"])
def test_options_are_those_of_the_help(command: str) -> None:
    help_ = re.sub(r"\x1b\[[0-9;]*m", "", usoflow(*command.split(), "--help").out)  # without colours
    section = reference().partition(f"## `usoflow {command}")[2].partition("\n## ")[0]
    listed = set(re.findall(r"(?:`|, |/)(--[a-z-]+)", section))
    assert listed == set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_)) - {"--help"}

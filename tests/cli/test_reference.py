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
    headings = [line.split("`")[1].split() for line in reference().splitlines() if line.startswith("## `")]
    commands = {words[1] for words in headings if len(words) > 1}
    assert {"run", "generate", "convert", "nodes", "models", "doctor"} <= commands
    assert {command for command in commands if command not in listed} == set()


SECTIONS = re.findall(r"^## `(usoflow[a-z ]*?)(?: [A-Z\[].*)?`$", reference(), re.MULTILINE)


@pytest.mark.parametrize("command", SECTIONS)
def test_options_are_those_of_the_help(command: str) -> None:
    help_ = re.sub(r"\x1b\[[0-9;]*m", "", usoflow(*command.split()[1:], "--help").out)  # without colours
    section = re.split(rf"^## `{command}(?: [A-Z\[].*)?`$", reference(), flags=re.MULTILINE)[1]
    section = section.partition("\n## ")[0]
    listed = set(re.findall(r"(?:`|, |/)(--[a-z-]+)", section))
    assert listed == set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_)) - {"--help"}

"""Command lines whose options take several words, or none, written out one by one."""

from __future__ import annotations

import shlex

import pytest

from shell import usoflow
from usoflow.cli.words import written_out

VALUED = {"--subject", "--style", "--seed", "--easycache"}
SEVERAL = {"--subject", "--style"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("P --subject a b c", "P --subject a --subject b --subject c"),
        ("P --subject=a b --style c", "P --subject=a --subject b --style c"),
        ("P --subject a b --seed -5 x", "P --subject a --subject b --seed -5 x"),
        ("--subject a P --style b c", "--subject a P --style b --style c"),
        ("--subject a --seed 1 P", "--subject a --seed 1 P"),
        ("P --easycache", "P --easycache 0.2"),
        ("P --easycache --seed 1", "P --easycache 0.2 --seed 1"),
        ("P --easycache 0.3 --seed 1", "P --easycache 0.3 --seed 1"),
        ("P --easycache=0.3", "P --easycache=0.3"),
        ("--easycache P", "--easycache 0.2 P"),
        ("P --style a --flag b", "P --style a --flag b"),  # one word too many: the parser says so
        ("--subject a -- --P", "--subject a -- --P"),
        ("P --subject a -h", "P --subject a -h"),
        ("P --subject - a", "P --subject - --subject a"),
        ("", ""),
    ],
)
def test_written_out(line: str, expected: str) -> None:
    words = list(written_out(shlex.split(line), VALUED, SEVERAL, {"--easycache": "0.2"}))
    assert words == shlex.split(expected)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("generate --style robot.png pixels.png 'a fox'", "PROMPT comes first"),
        ("run --set a.b=1 c.d=2 FILE", "FILE comes first"),
        ("generate a fox", 'usoflow generate "a fox"'),
        ("run a.json b.json", "Unexpected arguments: b.json"),
    ],
)
def test_words_too_many(line: str, advice: str) -> None:
    done = usoflow(*shlex.split(line))
    assert done.code == 2
    assert advice in " ".join(done.err.split())

"""The catalogue of errors and the source agree."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import usoflow
from usoflow.errors import CATALOGUE, UsoflowError
from usoflow.execution.order import NodeError

SOURCE = Path(usoflow.__file__).parent
RAISERS = {"UsoflowError", "_at"}  # `_at` of the executor adds the node
CODE_ARGUMENT = {"UsoflowError": 0, "_at": 1}


def literals(node: ast.AST) -> Iterator[str]:
    """Codes in an argument: a string, or the strings that a variable or a condition chooses between."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def raised() -> dict[str, str]:
    """Error code -> a place where it is raised."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        variables = {
            target.id: statement.value
            for statement in ast.walk(tree)
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name) and target.id == "code"
        }
        for call in ast.walk(tree):
            name = getattr(
                getattr(call, "func", None), "id", getattr(getattr(call, "func", None), "attr", "")
            )
            if isinstance(call, ast.Call) and name in RAISERS:
                argument = call.args[CODE_ARGUMENT[name]]
                argument = (
                    variables.get(argument.id, argument) if isinstance(argument, ast.Name) else argument
                )
                if isinstance(argument, ast.IfExp):
                    found |= dict.fromkeys([*literals(argument.body), *literals(argument.orelse)], path.name)
                elif not isinstance(argument, ast.Attribute):  # error.code: raised elsewhere
                    found |= dict.fromkeys(literals(argument), path.name)
    return found


def test_every_raised_code_is_in_the_catalogue() -> None:
    assert {code: place for code, place in raised().items() if code not in CATALOGUE} == {}


def test_every_code_of_the_catalogue_is_raised() -> None:
    assert set(CATALOGUE) - set(raised()) == set()


@pytest.mark.parametrize("code", CATALOGUE)
def test_meaning_and_remedy_are_sentences(code: str) -> None:
    kind = CATALOGUE[code]
    for text in (kind.meaning, kind.remedy):
        assert text == text.strip()
        assert text[0].isupper() or text[0] == "`"
        assert text.endswith(".")
    assert kind.exit_code in (2, 3, 4, 5, 6, 130)


def test_remedy_can_be_made_more_precise() -> None:
    assert UsoflowError("cancelled", "x").remedy == CATALOGUE["cancelled"].remedy
    assert UsoflowError("cancelled", "x", remedy="y").remedy == "y"


def test_unknown_codes_are_not_raised() -> None:
    with pytest.raises(KeyError):
        UsoflowError("no_such_code", "x")


@pytest.mark.parametrize(
    "error",
    [
        UsoflowError("image_missing", "cat.png does not exist.", remedy="Draw one."),
        NodeError("image_missing", "it is gone.", remedy=None, node_id="3", class_type="LoadImage"),
    ],
)
def test_errors_go_from_one_process_to_another(error: UsoflowError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)

"""Conversion equals what the official editor exported for the same workflow (see tests/pairs/NOTICE.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reference_nodes import registry
from usoflow.workflow import document
from usoflow.workflow.flatten import flatten

PAIRS = Path(__file__).parents[1] / "pairs"
SHARED = Path(__file__).parents[3] / "shared" / "assets" / "graph_pairs"
NOT_OURS = frozenset({"ImageBlend", "LoraLoader"})  # unknown to the editor that converted them


def names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".ui.json") for path in folder.glob("*.ui.json"))


def check(folder: Path, name: str, *, without: frozenset[str] = frozenset()) -> None:
    workflow = json.loads((folder / f"{name}.ui.json").read_text())
    expected = json.loads((folder / f"{name}.api.json").read_text())
    got = flatten(document.parse(workflow), registry(without)).prompt.to_json()
    for key, node in expected.items():
        # The editor loses the type of a node that it does not know; we keep it, so that an error can name it.
        node.setdefault("class_type", got[key]["class_type"])
    assert without_titles(got) == without_titles(expected)


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


@pytest.mark.parametrize("name", names(PAIRS))
def test_pair(name: str) -> None:
    check(PAIRS, name)


@pytest.mark.parametrize("name", names(PAIRS))
def test_pair_without_foreign_nodes(name: str) -> None:
    check(PAIRS, name, without=NOT_OURS)


@pytest.mark.shared
@pytest.mark.parametrize("name", names(SHARED))
def test_shared_pair(name: str) -> None:
    check(SHARED, name)


def test_all_pairs_are_here() -> None:
    assert len(names(PAIRS)) == 22


def test_unknown_node_keeps_its_type_and_warns() -> None:
    workflow = json.loads((PAIRS / "t_missing_node.ui.json").read_text())
    conversion = flatten(document.parse(workflow), registry())
    node = conversion.prompt.nodes["2"]
    assert node.class_type == "NotARealNode"
    expected = json.loads((PAIRS / "t_missing_node.api.json").read_text())["2"]["inputs"]
    assert node.inputs == expected
    assert conversion.warnings == ("node 2: there is no node type NotARealNode",)

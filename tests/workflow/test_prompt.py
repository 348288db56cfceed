"""Reading and changing prompts."""

from __future__ import annotations

from typing import Any

import pytest

from usoflow.errors import UsoflowError
from usoflow.workflow.prompt import Prompt, link_of

DATA: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 5, "model": ["4", 0]},
        "_meta": {"title": "The sampler"},
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "x"}, "_meta": {"title": "v1.0 text"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "y"}},
}


def test_round_trip() -> None:
    expected = {**DATA, "7": {**DATA["7"], "_meta": {"title": ""}}}
    assert Prompt.parse(DATA).to_json() == expected


@pytest.mark.parametrize(
    "data", [{}, [], None, 5, "x", {"1": 5}, {"1": {"class_type": "A"}}, {"1": {"inputs": []}}]
)
def test_not_a_prompt(data: object) -> None:
    with pytest.raises(UsoflowError) as raised:
        Prompt.parse(data)
    assert raised.value.code == "not_a_workflow"


def test_node_without_type() -> None:
    with pytest.raises(UsoflowError) as raised:
        Prompt.parse({"5": {"inputs": {}}})
    assert raised.value.code == "prompt_invalid"
    assert "5" in raised.value.detail


@pytest.mark.parametrize("name", ["3", "The sampler", "KSampler"])
def test_set(name: str) -> None:
    before = Prompt.parse(DATA)
    after = before.set(name, "seed", 9)
    assert after.nodes["3"].inputs == {"seed": 9, "model": ["4", 0]}
    assert before.nodes["3"].inputs["seed"] == 5


def test_a_list_that_is_no_link_is_wrapped() -> None:
    prompt = Prompt.parse(DATA)
    assert prompt.set("6", "text", ["a"]).nodes["6"].inputs["text"] == {"__value__": ["a"]}
    assert prompt.set("6", "text", ["3", 0]).nodes["6"].inputs["text"] == ["3", 0]


@pytest.mark.parametrize(
    ("assignment", "key", "name", "value"),
    [
        ("3.seed=9", "3", "seed", 9),
        ("3.seed=abc", "3", "seed", "abc"),
        ('3.model=["6", 1]', "3", "model", ["6", 1]),
        ("6.text=9", "6", "text", "9"),
        ("6.text=a=b.c", "6", "text", "a=b.c"),
        ("6.text=", "6", "text", ""),
        ("v1.0 text.text=z", "6", "text", "z"),
    ],
)
def test_assign(assignment: str, key: str, name: str, value: object) -> None:
    prompt = Prompt.parse(DATA)
    assert prompt.set(*prompt.assignment(assignment)).nodes[key].inputs[name] == value


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("3.seed", "NODE.INPUT=VALUE"),
        ("seed=5", "NODE.INPUT=VALUE"),
        ("99.seed=5", "3 (KSampler)"),
        ("3.sead=5", "seed, model"),
        ("CLIPTextEncode.text=x", "6, 7"),
    ],
)
def test_bad_assignment(assignment: str, told: str) -> None:
    prompt = Prompt.parse(DATA)
    with pytest.raises(UsoflowError) as raised:
        prompt.set(*prompt.assignment(assignment))
    assert raised.value.code == "set_invalid"
    assert told in raised.value.detail


@pytest.mark.parametrize("value", [["3"], ["3", "0"], [3, 0], ["3", True], ["3", 0, 0], "3", None, {"3": 0}])
def test_not_a_link(value: object) -> None:
    assert link_of(value) is None

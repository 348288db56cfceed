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
    """A node without a title gets none."""
    assert Prompt.parse(DATA).to_json() == DATA


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
    ("node", "name", "told"),
    [
        ("99", "seed", "3 (KSampler)"),
        ("3", "sead", "seed, model"),
        ("CLIPTextEncode", "text", "6 (v1.0 text), 7 (CLIPTextEncode)"),
    ],
)
def test_bad_names(node: str, name: str, told: str) -> None:
    with pytest.raises(UsoflowError) as raised:
        Prompt.parse(DATA).set(node, name, 5)
    assert raised.value.code == "set_invalid"
    assert told in raised.value.detail


def test_the_title_of_one_node_and_type_of_another_is_ambiguous() -> None:
    """A node has its type for a title until it is given one."""
    refiner = {**DATA["3"], "_meta": {"title": "Refiner"}}
    prompt = Prompt.parse({"3": {**DATA["3"], "_meta": {"title": "KSampler"}}, "4": refiner})
    assert prompt.find("Refiner") == "4"
    with pytest.raises(UsoflowError, match=r"2 nodes are called KSampler: 3 \(KSampler\), 4 \(Refiner\)"):
        prompt.find("KSampler")


def test_a_node_without_inputs() -> None:
    with pytest.raises(UsoflowError, match=r"node 1 \(A\) has no input x, only links"):
        Prompt.parse({"1": {"class_type": "A", "inputs": {}}}).set("1", "x", 5)


@pytest.mark.parametrize("value", [["3"], ["3", "0"], [3, 0], ["3", True], ["3", 0, 0], "3", None, {"3": 0}])
def test_not_a_link(value: object) -> None:
    assert link_of(value) is None

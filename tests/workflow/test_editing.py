"""Values written back into UI graphs: the graph then converts to the changed prompt."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_nodes import registry
from usoflow.workflow import document
from usoflow.workflow.editing import with_values
from usoflow.workflow.flatten import flatten
from usoflow.workflow.loading import template
from usoflow.workflow.prompt import link_of
from usoflow.workflow.text import escaped, first_alternatives

PAIRS = Path(__file__).parents[1] / "pairs"
NAMES = sorted(path.name.removesuffix(".ui.json") for path in PAIRS.glob("*.ui.json"))
USO = "flux1_dev_uso_reference_image_gen"

Inputs = dict[tuple[str, str], Any]


def inputs(workflow: dict[str, Any]) -> Inputs:
    prompt = flatten(document.parse(workflow), registry()).prompt
    return {(key, name): value for key, node in prompt.nodes.items() for name, value in node.inputs.items()}


def edited(workflow: dict[str, Any], values: Inputs) -> dict[str, Any]:
    found = with_values(workflow, values, registry())
    assert found is not None
    return found.workflow


def other(value: Any) -> Any:
    return value + 1 if isinstance(value, int | float) else "{odd|other} /text"


@pytest.mark.parametrize("name", NAMES)
def test_each_value_of_each_workflow(name: str) -> None:
    workflow = json.loads((PAIRS / f"{name}.ui.json").read_text())
    original, before = copy.deepcopy(workflow), inputs(workflow)
    values = {field: value for field, value in before.items() if link_of(value) is None}
    assert values
    for field, value in values.items():
        if field[1] != "filename_prefix" and not isinstance(value, dict | bool):
            assert inputs(edited(workflow, {field: other(value)})) == before | {field: other(value)}
    assert workflow == original


def test_a_field_that_the_subgraphs_node_shows_is_written_inside_and_outside() -> None:
    changed = edited(template(USO), {("112:31", "seed"): 5})
    host = next(node for node in changed["nodes"] if node["id"] == 112)
    inner = next(item for item in changed["definitions"]["subgraphs"] if item["id"] == host["type"])
    sampler = next(node for node in inner["nodes"] if node["id"] == 31)
    assert (host["widgets_values"][3], sampler["widgets_values"][0]) == (5, 5)


def with_two_uses() -> dict[str, Any]:
    """The template, whose second style reference is of the same subgraph as the first."""
    workflow = template(USO)
    host = next(node for node in workflow["nodes"] if node["id"] == 113)
    host["mode"] = 0
    inner = next(item for item in workflow["definitions"]["subgraphs"] if item["id"] == host["type"])
    first, second = (next(node for node in inner["nodes"] if node["id"] == key) for key in (89, 83))
    for node in (first, second):
        node["type"], node["widgets_values"] = first["type"], []  # so that their own fields count
    return workflow


def test_a_definition_that_two_nodes_share_is_copied() -> None:
    workflow = with_two_uses()
    before = inputs(workflow)
    assert before["113:83:115", "crop"] == before["113:89:115", "crop"] == "center"
    changed = edited(workflow, {("113:83:115", "crop"): "none"})
    assert inputs(changed) == before | {("113:83:115", "crop"): "none"}
    again = edited(changed, {("113:89:115", "crop"): "none"})
    assert inputs(again) == before | {("113:83:115", "crop"): "none", ("113:89:115", "crop"): "none"}
    assert len(again["definitions"]["subgraphs"]) == len(workflow["definitions"]["subgraphs"]) + 1


def small(**sampler: Any) -> dict[str, Any]:
    """A primitive that feeds a sampler's seed, whose name is in that of the file."""
    saver = {"id": 3, "type": "SaveImage", "inputs": [{"name": "images", "type": "IMAGE", "link": 2}]}
    return {
        "nodes": [
            {"id": 1, "type": "PrimitiveNode", "outputs": [{"name": "INT", "type": "INT", "links": [1]}],
             "widgets_values": [7, "fixed"]},
            {"id": 2, "type": "KSampler", "inputs": [
                {"name": "seed", "type": "INT", "link": 1, "widget": {"name": "seed"}}],
             "outputs": [{"name": "LATENT", "type": "LATENT", "links": [2]}],
             "widgets_values": [0, "fixed", 20, 1, "euler", "simple", 1], **sampler},
            {**saver, "widgets_values": ["a_%KSampler.seed%"]},
        ],
        "links": [[1, 1, 0, 2, 0, "INT"], [2, 2, 0, 3, 0, "LATENT"]],
    }  # fmt: skip


def test_a_primitive_and_a_file_name_that_tells_it() -> None:
    workflow = small(title="KSampler")
    found = with_values(workflow, {("2", "seed"): 9}, registry())
    assert found is not None
    assert found.workflow["nodes"][0]["widgets_values"] == [9, "fixed"]
    assert found.file_names == {("3", "filename_prefix"): "a_9"}


@pytest.mark.parametrize(
    ("held", "changed"),
    [
        ({"widgets_values": {"value": 7}}, {"widgets_values": {"value": 9}}),
        (
            {"widgets_values": [], "widgets_values_named": {"value": 7}},
            {"widgets_values": [], "widgets_values_named": {"value": 9}},
        ),
        ({"widgets_values": []}, {"widgets_values": [9]}),
    ],
)
def test_a_primitive_with_values_by_name_or_none(held: dict[str, Any], changed: dict[str, Any]) -> None:
    workflow = small()
    workflow["nodes"][0] |= held
    found = edited(workflow, {("2", "seed"): 9})
    assert found["nodes"][0].items() >= changed.items()
    assert inputs(found)["2", "seed"] == 9


def test_a_primitive_that_feeds_two() -> None:
    workflow = small()
    sampler = copy.deepcopy(workflow["nodes"][1]) | {"id": 4, "outputs": []}
    sampler["inputs"][0]["link"] = 3
    workflow["nodes"].append(sampler)
    workflow["links"].append([3, 1, 0, 4, 0, "INT"])
    named = {("3", "filename_prefix"): "a_9"}
    assert inputs(edited(workflow, {("2", "seed"): 9})) == inputs(workflow) | {("2", "seed"): 9} | named
    both: Inputs = {("2", "seed"): 9, ("4", "seed"): 9}
    changed = edited(workflow, both)
    assert inputs(changed) == inputs(workflow) | both | named
    assert changed["nodes"][0]["widgets_values"][0] == 9  # still feeds them


@pytest.mark.parametrize("stored", [None, [], [7], [7, "increment", 12]])
def test_a_field_that_the_file_does_not_store(stored: list[Any] | None) -> None:
    """What stands before it is filled with the defaults."""
    workflow = {"nodes": [{"id": 2, "type": "KSampler", "widgets_values": stored}], "links": []}
    changed = edited(workflow, {("2", "sampler_name"): "heun"})
    assert inputs(changed) == inputs(workflow) | {("2", "sampler_name"): "heun"}
    before = [0, "fixed", 20, 8.0]
    given = stored or []
    assert changed["nodes"][0]["widgets_values"] == [*given, *before[len(given) :], "heun"]


def test_a_link_gives_way_to_a_value() -> None:
    """A seed that a node computes: the link is cut at both ends."""
    workflow = small()
    workflow["nodes"][0]["type"] = "PrimitiveInt"
    assert inputs(workflow)["2", "seed"] == ["1", 0]
    changed = edited(workflow, {("2", "seed"): 9})
    assert inputs(changed)["2", "seed"] == 9
    assert changed["nodes"][0]["outputs"][0]["links"] == []
    assert [link[0] for link in changed["links"]] == [2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("2", "seed"), ["1", 0]),  # a link
        (("99", "seed"), 1),
        (("2:1", "seed"), 1),
        (("3", "images"), 1),
        (("2", "nothing"), 1),
    ],
)
def test_what_no_field_can_show(field: tuple[str, str], value: Any) -> None:
    assert with_values(small(), {field: value}, registry()) is None


@pytest.mark.parametrize("text", ["see https://a.b", r"a \{b|c} // d"])
def test_what_the_editor_would_resolve(text: str) -> None:
    """It can stand in the field of a subgraph's node, which the editor leaves as it is, but in no other."""
    assert inputs(edited(template(USO), {("112:6", "text"): text}))["112:6", "text"] == text
    node = {"id": 1, "type": "CLIPTextEncode", "inputs": [], "widgets_values": ["a"]}
    assert with_values({"nodes": [node], "links": []}, {("1", "text"): text}, registry()) is None


@given(st.text("ab{|} ", max_size=12))
def test_escaped_text_is_read_back(text: str) -> None:
    assert first_alternatives(escaped(text)) == (text, False)

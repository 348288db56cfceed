"""What older files say of the fields that subgraphs show, against what the official editor makes of it.

`golden/promoted.json` holds workflows made by hand, and what the editor (1.58.1) would send of each: the
inputs of its EmptyImage and KSampler nodes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from reference_nodes import registry
from usoflow.errors import UsoflowError
from usoflow.workflow.editing import with_values
from usoflow.workflow.loading import load_json
from usoflow.workflow.migration import opened
from usoflow.workflow.prompt import link_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "promoted.json").read_text())
CASES = {entry["name"]: (entry["workflow"], entry["sent"]) for entry in GOLDEN}


def inputs(workflow: dict[str, Any]) -> dict[str, Any]:
    prompt = load_json(workflow, registry()).prompt.to_json()
    return {
        key: node["inputs"]
        for key, node in prompt.items()
        if node["class_type"] in ("EmptyImage", "KSampler")
    }


@pytest.mark.parametrize("name", CASES)
def test_fields_hold_what_the_editor_would_send(name: str) -> None:
    workflow, sent = CASES[name]
    before = copy.deepcopy(workflow)
    assert inputs(workflow) == sent
    assert workflow == before


@pytest.mark.parametrize("name", CASES)
def test_what_was_opened_once_stays(name: str) -> None:
    once = opened(CASES[name][0])
    assert opened(once) == once
    assert inputs(once) == CASES[name][1]


@pytest.mark.parametrize(
    "name", sorted(CASES.keys() - {"K doubled name"})
)  # whose values contradict one another
def test_each_field_can_be_changed(name: str) -> None:
    workflow, sent = CASES[name]
    graph = opened(workflow)
    for key, fields in sent.items():
        for field, value in fields.items():
            if isinstance(value, list | str):
                continue
            edited = with_values(graph, {(key, field): value + 1}, registry())
            assert edited is not None, (key, field)
            assert inputs(edited.workflow) == {**sent, key: {**fields, field: value + 1}}


def changed(**more: Any) -> dict[str, Any]:
    """A graph whose subgraph shows a field that no link leads to."""
    workflow = copy.deepcopy(CASES["unlinked color"][0])
    workflow["definitions"]["subgraphs"][0] |= more
    return workflow


@pytest.mark.parametrize("part", ["links", "inputs", "nodes"])
def test_what_is_not_as_it_should_be_is_refused(part: str) -> None:
    with pytest.raises(UsoflowError) as error:
        load_json(changed(**{part: 7}), registry())
    assert error.value.code == "workflow_invalid"


@pytest.mark.parametrize("subgraphs", [None, 7, [7], [{"id": "S", "nodes": [7], "links": [7, []]}]])
def test_anything_can_be_opened(subgraphs: Any) -> None:
    host = {"id": 1, "type": "S", "properties": {"proxyWidgets": '[["1", "x"]]'}, "widgets_values": [3]}
    graph = {"nodes": [host, 7], "links": 7, "definitions": {"subgraphs": subgraphs}}
    assert opened(graph) == graph


@pytest.mark.parametrize("kind", [float, str])
def test_ids_of_links_may_be_written_otherwise(kind: type) -> None:
    workflow = changed()
    inner = workflow["definitions"]["subgraphs"][0]
    for link in inner["links"]:
        link["id"] = kind(link["id"])
    for slot in inner["nodes"][0]["inputs"]:
        slot["link"] = kind(slot["link"])
    assert inputs(workflow)["10:1"] == CASES["unlinked color"][1]["10:1"]
    prompt = load_json(workflow, registry()).prompt.to_json()
    assert prompt["3"]["inputs"]["images"] == ["10:1", 0]


def test_links_that_are_not_there_lead_nowhere() -> None:
    workflow = changed()
    slots = workflow["definitions"]["subgraphs"][0]["nodes"][0]["inputs"]
    slots[0]["link"] = 4  # width's; the next number that a link would get
    slots.append({"name": "color", "type": "INT", "link": 9})
    sent = inputs(workflow)["10:1"]
    assert (sent["width"], sent["height"], sent["color"]) == (100, 200, 7)


def test_many_subgraphs_within_one_another_and_many_fields_of_one_name() -> None:
    shows = {"proxyWidgets": [["1", "x"]]}
    deep = [
        {"id": f"S{n}", "nodes": [{"id": 1, "type": f"S{n + 1}", "properties": shows}]} for n in range(3000)
    ]
    host = {"id": 1, "type": "S0", "properties": shows, "widgets_values": [3]}
    assert opened({"nodes": [host], "definitions": {"subgraphs": deep}})
    wide = {"id": "S", "nodes": [{"id": n, "type": "EmptyImage"} for n in range(3000)]}
    many = {"proxyWidgets": [[str(n), "width"] for n in range(3000)]}
    host = {"id": 1, "type": "S", "properties": many, "widgets_values": [3] * 3000}
    found = opened({"nodes": [host], "definitions": {"subgraphs": [wide]}})
    names = [port["name"] for port in found["definitions"]["subgraphs"][0]["inputs"]]
    assert len(set(names)) == 3000


def test_a_subgraph_within_itself_ends() -> None:
    host = {"id": 1, "type": "S", "properties": {"proxyWidgets": [["1", "x"]]}, "widgets_values": [3]}
    inner = {"id": "S", "nodes": [copy.deepcopy(host)], "links": []}
    assert opened({"nodes": [host], "definitions": {"subgraphs": [inner]}})


def test_no_other_link_is_taken_away() -> None:
    """A field that a link within feeds is not one that the host's value could fill."""
    workflow = copy.deepcopy(CASES["unlinked color"][0])
    inner = workflow["definitions"]["subgraphs"][0]
    inner["nodes"].append(
        {"id": 2, "type": "PrimitiveInt", "outputs": [{"type": "INT"}], "widgets_values": [3]}
    )
    inner["nodes"][0]["inputs"].append(
        {"name": "color", "type": "INT", "link": 9, "widget": {"name": "color"}}
    )
    inner["links"].append({"id": 9, "origin_id": 2, "origin_slot": 0, "target_id": 1, "target_slot": 2})
    assert link_of(inputs(workflow)["10:1"]["color"]) == ("10:2", 0)

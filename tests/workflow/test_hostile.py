"""Whatever a file holds: a prompt, or a UsoflowError. And whatever a prompt holds: a verdict."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_nodes import NoFiles, reference, registry
from usoflow.errors import UsoflowError
from usoflow.schema.validation import validate
from usoflow.workflow.loading import load_bytes, load_json

PAIRS = Path(__file__).parents[1] / "pairs"
SMALL = ["t_bypass_multi", "t_primitive_node", "t_reroute_legacy", "t_subgraph_promoted", "t_missing_node"]
DOCUMENTS = [json.loads((PAIRS / f"{name}.ui.json").read_text()) for name in [*SMALL, "uso_style_on"]]
PROMPTS = [json.loads((PAIRS / f"{name}.api.json").read_text()) for name in [*SMALL[:4], "uso_style_on"]]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats(allow_nan=True)
    | st.text(alphabet=st.characters(), max_size=8)
    | st.sampled_from(["1", "2", 1, 2, -10, -20, 2**64, "__value__", "\ud800", *list(reference())[:5]])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
NODES = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(1, 4) | JSON,
        "type": st.sampled_from(["KSampler", "LoadImage", "Reroute", "PrimitiveNode", "sub", "Odd"]) | JSON,
        "mode": st.sampled_from([0, 2, 4]) | JSON,
        "inputs": st.lists(
            st.fixed_dictionaries({"name": st.just("image") | JSON, "link": st.integers(1, 4) | JSON}),
            max_size=3,
        ),
        "outputs": st.lists(st.fixed_dictionaries({"type": st.just("IMAGE") | JSON}), max_size=2) | JSON,
        "widgets_values": JSON,
        "properties": JSON,
    },
)
GRAPH = {
    "nodes": st.lists(NODES, max_size=5) | JSON,
    "links": st.lists(st.tuples(*[st.integers(-20, 5)] * 5).map(list) | JSON, max_size=6) | JSON,
}
SUBGRAPH = st.fixed_dictionaries({"id": st.just("sub") | JSON, "inputs": JSON, **GRAPH})
DEFINITIONS = st.fixed_dictionaries({"subgraphs": st.lists(SUBGRAPH, max_size=2)})
WORKFLOWS = st.fixed_dictionaries(GRAPH, optional={"definitions": DEFINITIONS | JSON})


def survives(data: Any) -> None:
    """Loading succeeds with a prompt that is JSON, or fails with an error of ours."""
    try:
        loaded = load_json(data, registry())
    except UsoflowError:
        return
    prompt = loaded.prompt.to_json()
    json.dumps(prompt)
    validate(prompt, registry(), NoFiles())


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(UsoflowError):
        load_bytes(data, registry())


@given(JSON)
@settings(deadline=None)
def test_any_json(data: Any) -> None:
    survives(data)


@given(WORKFLOWS)
@settings(max_examples=300, deadline=None)
def test_any_workflow(data: Any) -> None:
    survives(data)


@given(
    st.dictionaries(
        st.text(max_size=3), st.fixed_dictionaries({"inputs": JSON, "class_type": JSON}), max_size=3
    )
)
@settings(deadline=None)
def test_any_prompt(data: Any) -> None:
    survives(data)
    validate(data, registry(), NoFiles())


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested JSON."""
    found: list[tuple[Any, Any]] = []
    pending = [data]
    while pending:
        item = pending.pop()
        keys = item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        found += [(item, key) for key in keys]
        pending += [item[key] for key in keys]
    return found


def mutate(data: Any, draw: st.DataObject) -> Any:
    changed = copy.deepcopy(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        container, key = draw.draw(st.sampled_from(places(changed)))
        match draw.draw(st.sampled_from(["replace", "remove", "repeat", "swap"])):
            case "replace":
                container[key] = draw.draw(JSON)
            case "remove":
                del container[key]
            case "repeat" if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case _:
                other, place = draw.draw(st.sampled_from(places(changed) or [(container, key)]))
                container[key] = copy.deepcopy(other[place])
        if not places(changed):
            break
    return changed


@given(st.sampled_from(DOCUMENTS), st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_workflows(original: Any, draw: st.DataObject) -> None:
    survives(mutate(original, draw))


@given(st.sampled_from(PROMPTS), st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_prompts(original: Any, draw: st.DataObject) -> None:
    changed = mutate(original, draw)
    survives(changed)
    result = validate(changed, registry(), NoFiles())
    assert bool(result.outputs) == (result.error is None)
    json.dumps([result.error, result.node_errors])


@given(st.sampled_from(PROMPTS))
@settings(deadline=None)
def test_verdict_does_not_change_the_prompt(original: Any) -> None:
    before = copy.deepcopy(original)
    validate(original, registry(), NoFiles())
    assert original == before

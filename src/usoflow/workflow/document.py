"""The UI workflow: what the editor saves as JSON, format 0.4 (links as arrays) or 1.0 (links as objects).

`parse` takes decoded JSON from anywhere and keeps what conversion needs: nodes, links and subgraph
definitions. `flatten.py` turns it into a prompt. The format is documented at
https://docs.comfy.org/specs/workflow_json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from usoflow.errors import UsoflowError

MUTED: Final = 2
BYPASSED: Final = 4

INPUT_NODE: Final = "-10"  # stands for the subgraph's inputs in its links
OUTPUT_NODE: Final = "-20"  # stands for its outputs
OWN_INPUT: Final = "-1"  # of the fields that a subgraph's node shows: an input of its own


@dataclass(frozen=True, slots=True)
class Link:
    """From an output slot to a node."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True, slots=True)
class InputSlot:
    """An input of a node: `link` is a link id; `widget` the name of the field that it can replace."""

    name: str
    type: str
    link: str | None
    widget: str | None


@dataclass(frozen=True, slots=True)
class DocumentNode:
    """A node as saved. `values` are its fields in order, `named_values` by name (newer files)."""

    id: str
    type: str
    mode: int
    title: str
    inputs: tuple[InputSlot, ...]
    output_types: tuple[str, ...]
    values: tuple[Any, ...]
    named_values: Mapping[str, Any]
    search_name: str  # the name that %Node.widget% replacements use
    promoted: tuple[tuple[str, str], ...]  # (inner node id, field) of the fields a subgraph's node shows

    @property
    def skipped(self) -> bool:
        """Whether it is muted or bypassed."""
        return self.mode in (MUTED, BYPASSED)


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes and links of one level."""

    nodes: Mapping[str, DocumentNode]
    links: Mapping[str, Link]


@dataclass(frozen=True, slots=True)
class Subgraph:
    """A subgraph definition: a graph with named inputs and outputs."""

    id: str
    name: str
    graph: Graph
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A whole workflow file."""

    graph: Graph
    subgraphs: Mapping[str, Subgraph]


def looks_like_workflow(data: object) -> bool:
    """Whether decoded JSON is a UI workflow rather than a prompt."""
    return isinstance(data, dict) and isinstance(data.get("nodes"), list)


def parse(data: object) -> Document:
    """Read decoded JSON. Raises UsoflowError("workflow_invalid") that names the part that is wrong."""
    root = _object(data, "the workflow")
    definitions = _object(root.get("definitions") or {}, "definitions")
    subgraphs = [_subgraph(item) for item in _list(definitions.get("subgraphs"), "definitions.subgraphs")]
    return Document(
        _graph(root, "the workflow"), _unique({s.id: s for s in subgraphs}, subgraphs, "subgraphs")
    )


def _subgraph(data: object) -> Subgraph:
    item = _object(data, "a subgraph")
    key = _id(item.get("id"), "a subgraph's id")
    name = _text(item.get("name"))
    where = f"subgraph {name or key!r}"
    ports = [_object(port, f"{where}: an input") for port in _list(item.get("inputs"), f"{where}: inputs")]
    return Subgraph(key, name, _graph(item, where), tuple(_text(port.get("name")) for port in ports))


def _graph(item: Mapping[str, Any], where: str) -> Graph:
    nodes = [parse_node(node, where) for node in _list(item.get("nodes"), f"{where}: nodes")]
    links = [
        parse_link(link, where) for link in _list(item.get("links"), f"{where}: links") if link is not None
    ]
    return Graph(_unique({node.id: node for node in nodes}, nodes, f"{where}: nodes"), dict(links))


def parse_node(data: object, where: str = "the workflow") -> DocumentNode:
    """Read one node. Raises UsoflowError("workflow_invalid")."""
    item = _object(data, f"{where}: a node")
    key = _id(item.get("id"), f"{where}: a node's id")
    here = f"{where}: node {key}"
    properties = _object(item.get("properties") or {}, f"{here}: properties")
    values = item.get("widgets_values")
    named = values if isinstance(values, dict) else item.get("widgets_values_named")
    return DocumentNode(
        id=key,
        type=_required_text(item.get("type"), f"{here}: type"),
        mode=_int(item.get("mode") or 0, f"{here}: mode"),
        title=_text(item.get("title")),
        inputs=tuple(_input(slot, here) for slot in _list(item.get("inputs"), f"{here}: inputs")),
        output_types=tuple(
            _output_type(slot, here) for slot in _list(item.get("outputs"), f"{here}: outputs")
        ),
        values=() if isinstance(values, dict) else tuple(_list(values, f"{here}: widgets_values")),
        named_values=dict(_object(named or {}, f"{here}: widgets_values_named")),
        search_name=_text(properties.get("Node name for S&R")),
        promoted=promoted_fields(properties.get("proxyWidgets")),
    )


def _input(data: object, where: str) -> InputSlot:
    slot = _object(data, f"{where}: an input")
    widget = slot.get("widget")
    link = slot.get("link")
    return InputSlot(
        name=_required_text(slot.get("name"), f"{where}: an input's name"),
        type=_slot_type(slot.get("type")),
        link=None if link is None else _id(link, f"{where}: an input's link"),
        widget=_text(widget.get("name")) if isinstance(widget, dict) else None,
    )


def _output_type(data: object, where: str) -> str:
    return _slot_type(_object(data, f"{where}: an output").get("type"))


def promoted_fields(data: object) -> tuple[tuple[str, str], ...]:
    """`properties.proxyWidgets`: [["31", "seed"], ["-1", "text"], ...]; -1 is the subgraph's own input.

    The oldest files hold it as the text of JSON.
    """
    if isinstance(data, str):
        with suppress(ValueError, RecursionError):
            data = json.loads(data)
    entries = data if isinstance(data, list) else []
    pairs = [item for item in entries if isinstance(item, list) and len(item) >= 2]
    return tuple((str(node), str(field)) for node, field, *_ in pairs)


def parse_link(data: object, where: str = "the workflow") -> tuple[str, Link]:
    """Id and link of [id, origin, origin slot, target, target slot, type], or of an object with these fields.

    Raises UsoflowError("workflow_invalid").
    """
    here = f"{where}: a link"
    if isinstance(data, list) and len(data) >= 5:
        parts = data[:5]
    elif isinstance(data, dict):
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
        parts = [data.get(name) for name in names]
    else:
        raise _invalid(here, "neither an object nor a list of at least five")
    key, origin, origin_slot, target, target_slot = parts
    link = Link(_id(origin, here), _int(origin_slot, here), _id(target, here), _int(target_slot, here))
    return _id(key, here), link


def _slot_type(value: object) -> str:
    """Types are names; the editor writes 0 or "" where any type fits, and lists for old combos."""
    if isinstance(value, str) and value:
        return value
    return "COMBO" if isinstance(value, list) else "*"


def _unique(by_id: dict[str, Any], items: Sequence[DocumentNode | Subgraph], where: str) -> dict[str, Any]:
    if len(by_id) != len(items):
        twice = next(key for key, count in Counter(item.id for item in items).items() if count > 1)
        raise _invalid(where, f"two have the id {twice}")
    return by_id


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _invalid(where, "not an object")
    return value


def _list(value: object, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _invalid(where, "not a list")
    return value


def _int(value: object, where: str) -> int:
    """A slot number or mode; some writers send 0.0, or "0"."""
    try:
        return int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        raise _invalid(where, f"{_shown(value)} is not a whole number") from None


def _id(value: object, where: str) -> str:
    if isinstance(value, float) and value.is_integer():  # some writers send 1.0
        value = int(value)
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise _invalid(where, f"{_shown(value)} is not an id")


def _required_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _invalid(where, f"{_shown(value)} is not a text")
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _shown(value: object) -> str:
    return repr(value)[:60]


def _invalid(where: str, problem: str) -> UsoflowError:
    return UsoflowError("workflow_invalid", f"{where}: {problem}")

"""A saved UI workflow as the editor has it once it is open: what older editors wrote is brought up to date.

In older files a subgraph's node shows any fields of the nodes within, listed in `proxyWidgets`, and stores
their values. The editor (1.58.1) makes inputs of the subgraph of those that are none yet when it opens the
file (https://github.com/Comfy-Org/ComfyUI_frontend/pull/12197). So does `opened`; whatever reads the graph
then knows one way only.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

from usoflow.workflow.document import INPUT_NODE, OWN_INPUT, promoted_fields
from usoflow.workflow.flatten import PRIMITIVE
from usoflow.workflow.widgets import EDITOR_ONLY

QUARANTINE: Final = "proxyWidgetErrorQuarantine"
PREVIEW: Final = "$$"  # how the names of fields begin that show pictures and hold nothing

Raw = dict[str, Any]


def opened(workflow: Raw) -> Raw:
    """A copy whose subgraphs have an input for every field that their nodes show and hold a value for.

    Its nodes lack `proxyWidgetErrorQuarantine`, with which the editor (1.58.1) overwrites the prompt and size
    of an edited subgraph on every load. What is not as it should be stays, for `document.parse` to refuse.
    """
    copied = copy.deepcopy(workflow)
    definitions = copied.get("definitions")
    found = list(_objects(definitions.get("subgraphs") if isinstance(definitions, dict) else None))
    subgraphs = {str(item.get("id")): _Subgraph(item) for item in found if _is_whole(item)}
    for level in (copied, *found):
        for node in _objects(level.get("nodes")):
            if isinstance(properties := node.get("properties"), dict):
                properties.pop(QUARANTINE, None)
            stored = node.get("widgets_values")
            values = stored if isinstance(stored, list) else []
            for (key, field), value in zip(_promoted(node), values, strict=False):
                if value is not None:
                    _lead(node, key, field, subgraphs)
    return copied


class _Subgraph:
    """A definition that gets inputs, with what is looked up in it again and again."""

    def __init__(self, raw: Raw) -> None:
        self.id = str(raw.get("id"))
        self.nodes = {str(node.get("id")): node for node in _objects(raw.get("nodes"))}
        self._raw = raw
        self._names = {str(port.get("name")) for port in _objects(raw.get("inputs"))}
        self._link_ids = {number for link in raw.get("links") or () if (number := _id_of(link)) is not None}
        slots = (slot for node in self.nodes.values() for slot in _objects(node.get("inputs")))
        named = (_whole(slot.get("link")) for slot in slots)  # also of links that are not there
        self._last = max((0, *self._link_ids, *filter(None, named)))

    def give_input(self, host: Raw, key: str, field: str) -> bool:
        """An input for a field of a node within; False if a link leads there already."""
        node = self.nodes[key]
        if node.get("type") == PRIMITIVE:
            return self._take_over(host, node, field)
        ports, links = _list_of(self._raw, "inputs"), _list_of(self._raw, "links")
        slots = _list_of(node, "inputs")
        slot = _named(slots, field)
        if slot is None:
            slot = {"name": field, "type": "*", "link": None}
            slots.append(slot)
        if _whole(slot.get("link")) in self._link_ids:
            return False
        slot.setdefault("widget", {"name": field})
        self._last += 1
        slot["link"] = self._last
        self._link_ids.add(self._last)
        links.append(
            {
                "id": self._last,
                "origin_id": int(INPUT_NODE),
                "origin_slot": len(ports),
                "target_id": node.get("id"),
                "target_slot": slots.index(slot),
                "type": slot.get("type"),
            }
        )
        self._add_port(host, key, field, slot.get("type"), [self._last])
        return True

    def _take_over(self, host: Raw, primitive: Raw, field: str) -> bool:
        """An input in the place of a PrimitiveNode: it feeds what that fed."""
        key, place = str(primitive.get("id")), len(_list_of(self._raw, "inputs"))
        taken = [link for link in _objects(self._raw.get("links")) if str(link.get("origin_id")) == key]
        for link in taken:
            link |= {"origin_id": int(INPUT_NODE), "origin_slot": place}
        for output in _objects(primitive.get("outputs")):
            output["links"] = []
        if taken:
            links = [link.get("id") for link in taken]
            name = self._add_port(host, key, field, taken[0].get("type"), links)
            shown = [[OWN_INPUT, name] if entry == (key, field) else list(entry) for entry in _promoted(host)]
            host["properties"]["proxyWidgets"] = shown
        return False  # there is nothing behind it

    def _add_port(self, host: Raw, key: str, field: str, type_: Any, links: list[Any]) -> str:
        """An input of the subgraph and, if it has none of that name, of the node that stands for it."""
        name = self._free(field)
        port = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.id}/{key}/{field}")
        _list_of(self._raw, "inputs").append({"id": str(port), "name": name, "type": type_, "linkIds": links})
        outer = host.setdefault("inputs", [])
        if isinstance(outer, list) and _named(outer, name) is None:
            outer.append({"name": name, "type": type_, "widget": {"name": name}, "link": None})
        return name

    def _free(self, name: str) -> str:
        number = 0
        while (free := f"{name}_{number}" if number else name) in self._names:
            number += 1
        self._names.add(free)
        return free


def _lead(host: Raw, key: str, field: str, subgraphs: Mapping[str, _Subgraph]) -> None:
    """Inputs from a subgraph's node down to a field that it shows, as far as no link leads there yet."""
    if field in EDITOR_ONLY or field.startswith(PREVIEW):
        return
    pending = [(host, key)]
    while pending:
        outer, key = pending.pop()
        subgraph = subgraphs.get(str(outer.get("type")))
        if subgraph and key in subgraph.nodes and subgraph.give_input(outer, key, field):
            node = subgraph.nodes[key]
            pending += [(node, below) for below, name in _promoted(node) if name == field]


def _promoted(host: Raw) -> tuple[tuple[str, str], ...]:
    """The fields of nodes within that a subgraph's node shows."""
    properties = host.get("properties")
    return promoted_fields(properties.get("proxyWidgets")) if isinstance(properties, dict) else ()


def _is_whole(subgraph: Raw) -> bool:
    """Whether what is changed in it is as it should be."""
    graphs = (subgraph, *_objects(subgraph.get("nodes")))
    return isinstance(subgraph.get("links") or [], list) and all(
        isinstance(graph.get("inputs") or [], list) for graph in graphs
    )


def _id_of(link: Any) -> int | None:
    if isinstance(link, dict):
        return _whole(link.get("id"))
    return _whole(link[0]) if isinstance(link, list) and link else None


def _whole(value: Any) -> int | None:
    """An id, which some writers send as 1.0 or "1"."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _named(slots: list[Any], name: str) -> Raw | None:
    return next((slot for slot in _objects(slots) if slot.get("name") == name), None)


def _list_of(item: Raw, key: str) -> list[Any]:
    """A list of an object, which gets one if it has none."""
    if not isinstance(item.get(key), list):
        item[key] = []
    found: list[Any] = item[key]
    return found


def _objects(items: Any) -> Iterator[Raw]:
    return (item for item in items if isinstance(item, dict)) if isinstance(items, list) else iter(())

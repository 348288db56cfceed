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

from usoflow.workflow.document import INPUT_NODE, promoted_fields
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
    subgraphs = list(_objects(definitions.get("subgraphs") if isinstance(definitions, dict) else None))
    by_id = {str(subgraph.get("id")): subgraph for subgraph in subgraphs}
    for level in (copied, *subgraphs):
        for node in _objects(level.get("nodes")):
            if isinstance(properties := node.get("properties"), dict):
                properties.pop(QUARANTINE, None)
            stored = node.get("widgets_values")
            values = stored if isinstance(stored, list) else []
            for (key, field), value in zip(_shown(node), values, strict=False):
                if value is not None:
                    _lead(node, key, field, by_id)
    return copied


def _shown(host: Raw) -> tuple[tuple[str, str], ...]:
    """The fields of nodes within that a subgraph's node shows."""
    properties = host.get("properties")
    return promoted_fields(properties.get("proxyWidgets")) if isinstance(properties, dict) else ()


def _lead(host: Raw, key: str, field: str, subgraphs: Mapping[str, Raw]) -> None:
    """Inputs from a subgraph's node down to a field that it shows, where no link leads there yet."""
    subgraph = subgraphs.get(str(host.get("type")))
    inner = _objects(subgraph.get("nodes")) if subgraph else ()
    node = next((node for node in inner if str(node.get("id")) == key), None)
    if subgraph is None or node is None or field in EDITOR_ONLY or field.startswith(PREVIEW):
        return
    if _give_input(host, subgraph, node, field):
        for below, name in _shown(node):
            if name == field:
                _lead(node, below, field, subgraphs)


def _give_input(host: Raw, subgraph: Raw, node: Raw, field: str) -> bool:
    """An input of the subgraph for a field of a node within; False if a link leads there already."""
    slots = _list_of(node, "inputs")
    slot = _named(slots, field)
    if slot is None:
        slot = {"name": field, "type": "*", "widget": {"name": field}, "link": None}
        slots.append(slot)
    if slot.get("link") is not None:
        return False
    ports, links = _list_of(subgraph, "inputs"), _list_of(subgraph, "links")
    name = _free(field, [port.get("name") for port in _objects(ports)])
    link = 1 + max((_number(item) for item in links), default=0)
    slot["link"] = link
    target = node.get("id")
    links.append(
        {
            "id": link,
            "origin_id": int(INPUT_NODE),
            "origin_slot": len(ports),
            "target_id": target,
            "target_slot": slots.index(slot),
            "type": slot.get("type"),
        }
    )
    port_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{subgraph.get('id')}/{target}/{field}")
    ports.append({"id": str(port_id), "name": name, "type": slot.get("type"), "linkIds": [link]})
    if _named(outer := _list_of(host, "inputs"), name) is None:
        outer.append({"name": name, "type": slot.get("type"), "widget": {"name": name}, "link": None})
    return True


def _named(slots: list[Any], name: str) -> Raw | None:
    return next((slot for slot in _objects(slots) if slot.get("name") == name), None)


def _free(name: str, taken: list[Any]) -> str:
    number = 0
    while (free := f"{name}_{number}" if number else name) in taken:
        number += 1
    return free


def _number(link: Any) -> int:
    found = link.get("id") if isinstance(link, dict) else next(iter(link), 0) if isinstance(link, list) else 0
    return found if isinstance(found, int) else 0


def _list_of(item: Raw, key: str) -> list[Any]:
    """A list of an object, which gets one if it has none."""
    if not isinstance(item.get(key), list):
        item[key] = []
    found: list[Any] = item[key]
    return found


def _objects(items: Any) -> Iterator[Raw]:
    return (item for item in items if isinstance(item, dict)) if isinstance(items, list) else iter(())

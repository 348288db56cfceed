"""Values written into a UI graph, so that it shows, in the editor, what a changed prompt runs.

A value goes into the field of the node itself and into every field that feeds it from outside: a primitive's,
or the one that a subgraph's node shows. `with_values` is the inverse of `flatten` for values.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from usoflow.errors import UsoflowError
from usoflow.schema.node import NodeRegistry
from usoflow.schema.specs import NodeSchema
from usoflow.schema.values import unwrapped
from usoflow.workflow import document, text, widgets
from usoflow.workflow.document import INPUT_NODE, Link
from usoflow.workflow.flatten import PRIMITIVE, flatten
from usoflow.workflow.host_fields import shown_names
from usoflow.workflow.prompt import link_of

Field = tuple[str, str]  # a node's id in the prompt, and the name of its input
Raw = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Edited:
    """The changed UI graph, and file names of the prompt that change with it."""

    workflow: Raw
    file_names: Mapping[Field, Any]


def with_values(
    workflow: Mapping[str, Any], values: Mapping[Field, Any], registry: NodeRegistry
) -> Edited | None:
    """A copy of a UI graph that converts to the same prompt but for these values.

    Args:
        workflow: decoded JSON.
        values: by node id (as in the prompt, "112:31") and input; a list is {"__value__": [...]}.
        registry: tells the fields of the node types.

    Returns:
        None where no field can say it: a link instead of a value, a node that the UI graph does not have.
    """
    try:
        return _edited(workflow, values, registry, alone=False) or _edited(
            workflow, values, registry, alone=True
        )
    except (UsoflowError, LookupError, TypeError, AttributeError):
        return None  # graphs of any origin: what is not as expected has no such field


def _edited(
    workflow: Mapping[str, Any], values: Mapping[Field, Any], registry: NodeRegistry, *, alone: bool
) -> Edited | None:
    """None if other values would change too. `alone` cuts nodes off from what feeds others as well."""
    changed = copy.deepcopy(dict(workflow))
    for (key, name), value in values.items():
        _Place(changed, registry, key, alone=alone).write(name, value)
    now = datetime.now()
    before, after = (_inputs(graph, registry, now) for graph in (workflow, changed))
    moved = {field: value for field, value in after.items() if value != before.get(field)}
    file_names = {field: value for field, value in moved.items() if field[1] == text.FILE_NAME}
    return Edited(changed, file_names) if after == before | dict(values) | file_names else None


def _inputs(workflow: Mapping[str, Any], registry: NodeRegistry, now: datetime) -> dict[Field, Any]:
    prompt = flatten(document.parse(workflow), registry, now=now).prompt
    return {(key, name): value for key, node in prompt.nodes.items() for name, value in node.inputs.items()}


class _Place:
    """A node of a UI graph, and the subgraphs around it, whose definitions become its own.

    Args:
        root: the UI graph; is changed.
        registry: tells the fields of the node types.
        key: the node's id in the prompt.
        alone: cut links instead of writing into the primitives they come from.
    """

    def __init__(self, root: Raw, registry: NodeRegistry, key: str, *, alone: bool) -> None:
        self._root, self._registry, self._alone = root, registry, alone
        *hosts, own = key.split(":")
        self._levels, self._hosts = [root], list[Raw]()
        for host in hosts:
            self._hosts.append(_find(self._levels[-1], host))
            self._levels.append(_own_definition(root, self._hosts[-1], key))
        self._node = _find(self._levels[-1], own)

    def write(self, name: str, value: Any) -> None:
        """Put a value into the field of this name, and into those that feed it.

        Raises LookupError if there is none.
        """
        if link_of(value):
            raise LookupError(name)
        value = unwrapped(value)
        schema = self._registry.schema(self._node["type"])
        is_dynamic = isinstance(value, str) and widgets.is_dynamic(schema, name)
        own = text.escaped(value) if is_dynamic else value
        names = widgets.names_along(document.parse_node(self._node), schema)
        if schema:
            _pad(self._node, names, name, schema)
        _store(self._node, names, name, own)
        slot = _slot(self._node, name)
        if slot is not None:
            self._write_behind(len(self._levels) - 1, slot, value, own)

    def _write_behind(self, depth: int, slot: Raw, value: Any, own: Any) -> None:
        """Into the field that a link comes from; a link from anything else is cut.

        `own` is how the node's own field has it, and a primitive's.
        """
        level = self._levels[depth]
        link = _link(level, slot)
        if link is None:
            return
        if link.origin == INPUT_NODE:
            self._write_outside(depth, slot, link.origin_slot, value, own)
        elif self._is_field(level, link):
            _store_own(_find(level, link.origin), own)
        else:
            _cut(level, slot)

    def _write_outside(self, depth: int, slot: Raw, port: int, value: Any, own: Any) -> None:
        """Into the field that the subgraph's node shows for a port of the subgraph."""
        host, name = self._hosts[depth - 1], self._levels[depth]["inputs"][port]["name"]
        outer = _slot(host, name)
        link = None if outer is None else _link(self._levels[depth - 1], outer)
        if outer is None or link is None:
            subgraph = document.parse(self._root).subgraphs[host["type"]]
            _store(host, shown_names(document.parse_node(host), subgraph), name, value)
        elif link.origin == INPUT_NODE or self._is_field(self._levels[depth - 1], link):
            self._write_behind(depth - 1, outer, value, own)
        else:
            _cut(self._levels[depth], slot)

    def _is_field(self, level: Raw, link: Link) -> bool:
        return not self._alone and _find(level, link.origin)["type"] == PRIMITIVE


def _pad(node: Raw, names: Sequence[str], name: str, schema: NodeSchema) -> None:
    """Lengthen `widgets_values` up to a field that the file does not store, by what such fields hold."""
    stored = node.get("widgets_values") or []
    by_name_only = isinstance(stored, dict) or (not stored and node.get("widgets_values_named"))
    if name in names and not by_name_only:
        missing = names[len(stored) : names.index(name) + 1]
        node["widgets_values"] = [*stored, *(widgets.default(schema, field) for field in missing)]


def _store_own(primitive: Raw, value: Any) -> None:
    """Into a primitive, by place or by name, as `flatten` reads it."""
    stored = primitive.get("widgets_values") or primitive.get("widgets_values_named")
    if not stored:
        primitive["widgets_values"] = [value]
    else:
        stored[next(iter(stored)) if isinstance(stored, dict) else 0] = value


def _store(node: Raw, names: Sequence[str], name: str, value: Any) -> None:
    """Into `widgets_values`, by place or by name, and where there is one into the copy by name."""
    stored = node.get("widgets_values")
    if isinstance(stored, dict):
        stored[name] = value
    elif stored and name in names:
        place = names.index(name)
        stored[place : place + 1] = [value]
    if name in (node.get("widgets_values_named") or ()):
        node["widgets_values_named"][name] = value


def _slot(node: Raw, name: str) -> Raw | None:
    slots: list[Raw] = node.get("inputs") or []
    return next((slot for slot in slots if slot["name"] == name), None)


def _find(level: Raw, key: str) -> Raw:
    found: Raw = {str(node["id"]): node for node in level["nodes"]}[key]
    return found


def _link(level: Raw, slot: Raw) -> Link | None:
    links = dict(document.parse_link(link) for link in level["links"] if link is not None)
    return links.get(str(slot.get("link")))


def _cut(level: Raw, slot: Raw) -> None:
    """Remove the link that ends at a slot, at both of its ends."""
    key, slot["link"] = slot["link"], None
    level["links"] = [link for link in level["links"] if link is None or _key(link) != key]
    starts = [output for node in level["nodes"] for output in node.get("outputs") or ()]
    for start in starts:
        if key in (start.get("links") or ()):
            start["links"].remove(key)
    for port in level.get("inputs") or ():  # of a subgraph
        if key in (port.get("linkIds") or ()):
            port["linkIds"].remove(key)


def _key(link: Any) -> Any:
    return link["id"] if isinstance(link, dict) else link[0]


def _own_definition(root: Raw, host: Raw, key: str) -> Raw:
    """The definition of the subgraph that a node stands for; a copy first if other nodes use it too."""
    definitions: list[Raw] = root["definitions"]["subgraphs"]
    found = {item["id"]: item for item in definitions}[host["type"]]
    users = [node for level in (root, *definitions) for node in level["nodes"] if node["type"] == found["id"]]
    if len(users) > 1:
        name = f"{found['id']}/{key.rpartition(':')[0]}/{host['id']}"
        found = {**copy.deepcopy(found), "id": str(uuid.uuid5(uuid.NAMESPACE_OID, name))}
        definitions.append(found)
        host["type"] = found["id"]
    return found

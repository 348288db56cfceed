"""A UI graph as decoded JSON, changed in place as one changes it in the editor.

Works on one level: the top, or a subgraph's definition (`subgraph`). Made for workflows of known structure
(`official`): nodes that are not there are a KeyError, not a user's mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Self

ACTIVE: Final = 0
BYPASSED: Final = 4
NODE_SIZE: Final = (270, 150)  # room that the editor gives a node; it enlarges it where need be
_GAP: Final = 40

Source = tuple[int, int]  # a node and one of its outputs


class Graph:
    """One level of a workflow.

    Args:
        data: the workflow, or a subgraph's definition.
        root: the workflow, for a subgraph.
    """

    def __init__(self, data: dict[str, Any], root: dict[str, Any] | None = None) -> None:
        self.data = data
        self._root = data if root is None else root

    def subgraph(self, host: int) -> Self:
        """The definition of the subgraph that a node stands for."""
        key = self._node(host)["type"]
        found = next(item for item in self._root["definitions"]["subgraphs"] if item["id"] == key)
        return type(self)(found, self._root)

    def set_active(self, active: bool, *nodes: int) -> None:
        """Switch nodes on, or bypass them, as Ctrl+B does."""
        for node in nodes:
            self._node(node)["mode"] = ACTIVE if active else BYPASSED

    def set_values(self, node: int, values: Mapping[int, Any]) -> None:
        """Fill in fields by their place among the node's `widgets_values`."""
        for place, value in values.items():
            self._node(node)["widgets_values"][place] = value

    def drop_property(self, node: int, name: str) -> None:
        """Take one of a node's properties away, if it has it."""
        self._node(node)["properties"].pop(name, None)

    def origin(self, node: int, name: str) -> Source:
        """Where the link into an input comes from."""
        link = self._link(self._slot(node, name)["link"])
        return link["origin_id"], link["origin_slot"]

    def add(
        self,
        type_: str,
        inputs: Mapping[str, Source],
        outputs: Sequence[str],
        values: Sequence[Any],
        place: tuple[float, float],
    ) -> int:
        """Add a node.

        Args:
            type_: its type.
            inputs: the origin of each of its links, by the name of the input.
            outputs: types of its outputs.
            values: of its fields.
            place: of its upper left corner.

        Returns:
            Its id.
        """
        key = self._new_id("last_node_id", "lastNodeId")
        self.data["nodes"].append(
            {
                "id": key,
                "type": type_,
                "pos": list(place),
                "size": list(NODE_SIZE),
                "flags": {},
                "order": len(self.data["nodes"]),
                "mode": ACTIVE,
                "inputs": [
                    {"name": name, "type": self._type(origin), "link": None}
                    for name, origin in inputs.items()
                ],
                "outputs": [{"name": kind, "type": kind, "links": []} for kind in outputs],
                "properties": {"Node name for S&R": type_},
                "widgets_values": list(values),
            }
        )
        for name, origin in inputs.items():
            self.connect(origin, key, name)
        return key

    def connect(self, origin: Source, node: int, name: str) -> None:
        """Link an output to an input, instead of what is linked to it now."""
        slot = self._slot(node, name)
        if slot["link"] is not None:
            self._disconnect(slot)
        key = self._new_id("last_link_id", "lastLinkId")
        slot["link"] = key
        self._node(origin[0])["outputs"][origin[1]]["links"].append(key)
        self.data["links"].append(
            {
                "id": key,
                "origin_id": origin[0],
                "origin_slot": origin[1],
                "target_id": node,
                "target_slot": self._node(node)["inputs"].index(slot),
                "type": self._type(origin),
            }
        )

    def move_links(self, source: Source, to: Source) -> None:
        """Let everything that an output is linked to come from another one."""
        for key in list(self._node(source[0])["outputs"][source[1]]["links"]):
            link = self._link(key)
            target = self._node(link["target_id"])
            self.connect(to, target["id"], target["inputs"][link["target_slot"]]["name"])

    def retype(self, node: int, type_: str, field: str, values: Sequence[Any]) -> None:
        """Make a loader another one, whose first field and only output take the place of its first ones.

        Args:
            node: which.
            type_: its new type.
            field: name of the first field, which a node around the subgraph may show.
            values: of its fields.
        """
        data = self._node(node)
        (slot,) = data["inputs"]
        shown = [item for item in self.data["inputs"] if slot["link"] in item["linkIds"]]
        for named in (slot, slot["widget"], *shown):
            named |= {key: field for key in ("name", "localized_name") if key in named}
        data |= {"type": type_, "outputs": data["outputs"][:1], "widgets_values": list(values)}
        data["properties"]["Node name for S&R"] = type_

    def insert_before(
        self,
        node: int,
        name: str,
        type_: str,
        through: str,
        values: Sequence[Any],
        inputs: Mapping[str, Source] = MappingProxyType({}),
        place: tuple[float, float] | None = None,
    ) -> None:
        """Put a new node into the link that ends at an input.

        Args:
            node: whose input it is.
            name: of the input.
            type_: of the new node, whose only output has the type of the link.
            through: the new node's input that takes what came through the link.
            values: of its fields.
            inputs: origins of its other links.
            place: of its upper left corner; default is above the node.
        """
        source = self.origin(node, name)
        links = {through: source, **inputs}
        new = self.add(type_, links, (self._type(source),), values, place or self._above(node))
        self.connect((new, 0), node, name)

    def _slot(self, node: int, name: str) -> dict[str, Any]:
        slots: list[dict[str, Any]] = self._node(node)["inputs"]
        return {slot["name"]: slot for slot in slots}[name]

    def _link(self, key: int) -> dict[str, Any]:
        links: list[dict[str, Any]] = self.data["links"]
        return {link["id"]: link for link in links}[key]

    def _type(self, origin: Source) -> str:
        kind: str = self._node(origin[0])["outputs"][origin[1]]["type"]
        return kind

    def _disconnect(self, slot: dict[str, Any]) -> None:
        link = self._link(slot["link"])
        self.data["links"].remove(link)
        self._node(link["origin_id"])["outputs"][link["origin_slot"]]["links"].remove(link["id"])

    def _node(self, key: int) -> dict[str, Any]:
        found: dict[str, Any] = {item["id"]: item for item in self.data["nodes"]}[key]
        return found

    def _above(self, node: int) -> tuple[float, float]:
        """A place above a node and what stands there already."""
        left, top = self._node(node)["pos"]
        standing = sum(1 for x, y in (item["pos"] for item in self.data["nodes"]) if x == left and y < top)
        return left, top - (standing + 1) * (NODE_SIZE[1] + _GAP)

    def _new_id(self, counter: str, inner: str) -> int:
        """An id that no level uses; the file's counters are moved on."""
        subgraphs = self._root["definitions"]["subgraphs"]
        key = 1 + max(self._root[counter], *(level["state"][inner] for level in subgraphs))
        self._root[counter] = key
        for level in subgraphs:
            level["state"][inner] = key
        return int(key)

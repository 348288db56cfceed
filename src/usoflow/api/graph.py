"""A UI graph as decoded JSON, changed in place as one changes it in the editor.

Works on one level: the top, or a subgraph's definition (`subgraph`). Made for workflows of known structure
(`official`): nodes that are not there are a KeyError, not a user's mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

ACTIVE: Final = 0
BYPASSED: Final = 4
_NODE_SIZE: Final = (270, 150)  # room that the editor gives a node; it enlarges it where need be
_GAP: Final = 40


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

    def insert_before(self, node: int, name: str, type_: str, through: str, values: Sequence[Any]) -> None:
        """Put a new node into the link that ends at an input.

        Args:
            node: whose input it is.
            name: of the input.
            type_: of the new node, whose only output has the type of the link.
            through: the new node's input that takes what came through the link.
            values: of its fields.
        """
        target = self._node(node)
        slot = next(place for place, item in enumerate(target["inputs"]) if item["name"] == name)
        into = target["inputs"][slot]
        old = next(item for item in self.data["links"] if item["id"] == into["link"])
        new_id, link_id = self._new_ids()
        kind = old["type"]
        self.data["nodes"].append(
            {
                "id": new_id,
                "type": type_,
                "pos": [target["pos"][0], target["pos"][1] - self._inserted() * (_NODE_SIZE[1] + _GAP)],
                "size": list(_NODE_SIZE),
                "flags": {},
                "order": target["order"],
                "mode": ACTIVE,
                "inputs": [{"name": through, "type": kind, "link": old["id"]}],
                "outputs": [{"name": kind, "type": kind, "links": [link_id]}],
                "properties": {"Node name for S&R": type_},
                "widgets_values": list(values),
            }
        )
        old.update(target_id=new_id, target_slot=0)
        into["link"] = link_id
        self.data["links"].append(
            {
                "id": link_id,
                "origin_id": new_id,
                "origin_slot": 0,
                "target_id": node,
                "target_slot": slot,
                "type": kind,
            }
        )

    def _node(self, key: int) -> dict[str, Any]:
        found: dict[str, Any] = {item["id"]: item for item in self.data["nodes"]}[key]
        return found

    def _inserted(self) -> int:
        """How many nodes stand above, so that a new one does not cover another."""
        return 1 + sum(1 for node in self.data["nodes"] if tuple(node["size"]) == _NODE_SIZE)

    def _new_ids(self) -> tuple[int, int]:
        """Ids of a node and a link that no level uses; the file's counters are moved on."""
        levels = [self._root, *self._root["definitions"]["subgraphs"]]
        counters = [self._root["last_node_id"], self._root["last_link_id"]]
        for level in levels[1:]:
            counters[0] = max(counters[0], level["state"]["lastNodeId"])
            counters[1] = max(counters[1], level["state"]["lastLinkId"])
        node_id, link_id = counters[0] + 1, counters[1] + 1
        self._root.update(last_node_id=node_id, last_link_id=link_id)
        for level in levels[1:]:
            level["state"].update(lastNodeId=node_id, lastLinkId=link_id)
        return node_id, link_id

"""The fields that a node which stands for a subgraph shows: which of those within, and their values.

Read from the UI graph; `flatten` and `editing` ask. The editor stores such values by position.
"""

from __future__ import annotations

from typing import Any

from usoflow.workflow import widgets
from usoflow.workflow.document import INPUT_NODE, OWN_INPUT, DocumentNode, Subgraph


def host_values(host: DocumentNode, subgraph: Subgraph) -> dict[str, Any]:
    """Values of the fields that a subgraph's node shows, by the name of the subgraph's input."""
    stored = widgets.by_name(shown_names(host, subgraph), host.values, host.named_values)
    return {name: value for name, value in stored.items() if name and value is not None}


def shown_names(host: DocumentNode, subgraph: Subgraph) -> list[str]:
    """The subgraph's inputs along the values of its node; "" for a value that none leads to.

    They are stored in the order of the subgraph's inputs that lead to fields, or of `proxyWidgets` where the
    file has it.
    """
    shown = shown_fields(subgraph)
    if not host.promoted:
        return [name for name in subgraph.inputs if name in shown.values()]
    own = {name: name for name in subgraph.inputs}
    return [
        own.get(field, "") if node == OWN_INPUT else shown.get((node, field), "")
        for node, field in host.promoted
    ]


def shown_fields(subgraph: Subgraph) -> dict[tuple[str, str], str]:
    """(inner node, its field) -> the subgraph's input that leads to it."""
    found: dict[tuple[str, str], str] = {}
    for node in subgraph.graph.nodes.values():
        for slot in node.inputs:
            link = subgraph.graph.links.get(slot.link) if slot.link and slot.widget else None
            if (
                link
                and slot.widget
                and link.origin == INPUT_NODE
                and 0 <= link.origin_slot < len(subgraph.inputs)
            ):
                found[node.id, slot.widget] = subgraph.inputs[link.origin_slot]
    return found

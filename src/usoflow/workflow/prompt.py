"""The prompt: what is executed. Node ids to class types and inputs, as ComfyUI's API takes it.

    {"31": {"class_type": "KSampler", "inputs": {"seed": 5, "model": ["30", 0]}, "_meta": {"title": "..."}}}

An input is a value or a link `[node id, output index]`; a list that is a value is {"__value__": [...]}.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from usoflow.errors import UsoflowError
from usoflow.schema.values import wrapped


@dataclass(frozen=True, slots=True)
class PromptNode:
    """One node: its type, its inputs by name, and its title in the editor."""

    class_type: str
    inputs: Mapping[str, Any]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """An immutable prompt; `set` returns a changed copy."""

    nodes: Mapping[str, PromptNode]

    @classmethod
    def parse(cls, data: object) -> Prompt:
        """Read decoded JSON. Raises UsoflowError("not_a_workflow") unless it is shaped as a prompt."""
        if not looks_like_prompt(data):
            detail = "the JSON is neither a workflow nor a prompt"
            others = _no_nodes(data) if isinstance(data, dict) else []
            if isinstance(data, dict) and 0 < len(others) < len(data):
                detail += f": it has nodes, but {', '.join(map(repr, others[:3]))} is none"
                detail += " (a node has class_type and inputs)"
            raise UsoflowError("not_a_workflow", detail)
        assert isinstance(data, dict)
        return cls({str(key): _node(str(key), value) for key, value in data.items()})

    def to_json(self) -> dict[str, Any]:
        """The form that ComfyUI's API takes."""
        return {
            key: {"inputs": dict(node.inputs), "class_type": node.class_type}
            | ({"_meta": {"title": node.title}} if node.title else {})
            for key, node in self.nodes.items()
        }

    def find(self, name: str) -> str:
        """The id of a node, given its id, or its title or class type if only one node has it.

        Raises UsoflowError("set_invalid").
        """
        if name in self.nodes:
            return name
        found = {key: node for key, node in self.nodes.items() if name in (node.title, node.class_type)}
        if len(found) == 1:
            return next(iter(found))
        if found:
            listed = ", ".join(f"{key} ({node.title or node.class_type})" for key, node in found.items())
            raise UsoflowError("set_invalid", f"{len(found)} nodes are called {name}: {listed}")
        raise UsoflowError("set_invalid", f"no node {name};{self._meant(name)} there are {_listing(self)}")

    def _meant(self, name: str) -> str:
        """A node with nearly this id, title or type."""
        names = [n for key, node in self.nodes.items() for n in (key, node.title, node.class_type) if n]
        lowered = {n.lower(): n for n in names}
        close = difflib.get_close_matches(name.strip().lower(), lowered, n=1, cutoff=0.8)
        return f" did you mean {lowered[close[0]]}?" if close else ""

    def set(self, node: str, input: str, value: object, *, optional: Collection[str] = ()) -> Prompt:
        """A copy with another value (or link) for an input; `optional` ones need not be there yet.

        Raises UsoflowError("set_invalid") if there is no such node or it has no such input.
        """
        key = self.find(node)
        old = self.nodes[key]
        if input not in old.inputs and input not in optional:
            raise no_input(key, old, input, dict.fromkeys([*old.inputs, *optional]))
        given = value if link_of(value) else wrapped(value)
        return Prompt({**self.nodes, key: replace(old, inputs={**old.inputs, input: given})})


def looks_like_prompt(data: object) -> bool:
    """Whether decoded JSON maps ids to nodes."""
    return isinstance(data, dict) and bool(data) and not _no_nodes(data)


def _no_nodes(data: Mapping[str, Any]) -> list[str]:
    """The ids of what is no node."""
    return [
        key
        for key, node in data.items()
        if not (isinstance(node, dict) and isinstance(node.get("inputs"), dict))
    ]


def no_input(key: str, node: PromptNode, name: str, known: Iterable[str]) -> UsoflowError:
    """The error of an input that is to be set and that a node does not have."""
    only = ", ".join(known) or "links"
    return UsoflowError("set_invalid", f"node {key} ({node.class_type}) has no input {name}, only {only}")


def link_of(value: object) -> tuple[str, int] | None:
    """The node and output index that an input's value links to, if it is a link."""
    if isinstance(value, list) and len(value) == 2:
        node, slot = value
        if isinstance(node, str) and isinstance(slot, int) and not isinstance(slot, bool):
            return node, slot
    return None


def _node(key: str, data: Mapping[str, Any]) -> PromptNode:
    class_type = data.get("class_type")
    if not isinstance(class_type, str):
        raise UsoflowError("prompt_invalid", f"node {key} has no class_type")
    meta = data.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return PromptNode(class_type, dict(data["inputs"]), title if isinstance(title, str) else "")


def _listing(prompt: Prompt) -> str:
    return ", ".join(f"{key} ({node.class_type})" for key, node in prompt.nodes.items())

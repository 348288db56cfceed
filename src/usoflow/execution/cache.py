"""Outputs kept from run to run, by what really went into them.

The key of a node follows from its type, its values, the keys of the nodes it is linked to, and the state of
the files it names, so that a changed picture or model file is noticed under the same name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.schema.node import NodeRegistry
from usoflow.schema.specs import InputImage, InputSpec, ModelFile
from usoflow.schema.values import image_location
from usoflow.settings import Folders
from usoflow.workflow.prompt import Prompt, PromptNode, link_of, unwrapped

Outputs = tuple[Any, ...]


class OutputCache:
    """Outputs of the last run by key. A node that the run did not use is forgotten."""

    def __init__(self) -> None:
        self._outputs: dict[str, Outputs] = {}

    def get(self, key: str) -> Outputs | None:
        return self._outputs.get(key)

    def put(self, key: str, outputs: Outputs) -> None:
        self._outputs[key] = outputs

    def keep_only(self, keys: set[str]) -> None:
        """Forget every other output."""
        self._outputs = {key: outputs for key, outputs in self._outputs.items() if key in keys}

    def clear(self) -> None:
        self._outputs = {}


def keys(prompt: Prompt, order: list[str], registry: NodeRegistry, folders: Folders) -> Mapping[str, str]:
    """The cache key of every node in `order`, in which a node follows those it is linked to."""
    found: dict[str, str] = {}
    for node_id in order:
        node = prompt.nodes[node_id]
        parts = {
            name: _part(node, name, value, found, registry, folders) for name, value in node.inputs.items()
        }
        entry = registry[node.class_type]
        told = entry.changed(constants(node)) if entry.changed else ""
        own = node_id if "UNIQUE_ID" in entry.schema.hidden.values() else ""  # it may compute with that
        text = json.dumps([node.class_type, parts, told, own], sort_keys=True, default=str)
        found[node_id] = hashlib.sha256(text.encode()).hexdigest()
    return found


def constants(node: PromptNode) -> Mapping[str, Any]:
    """The inputs of a node that are values; those that are links are None, as in ComfyUI."""
    return {name: None if link_of(value) else unwrapped(value) for name, value in node.inputs.items()}


def _part(
    node: PromptNode,
    name: str,
    value: Any,
    known: Mapping[str, str],
    registry: NodeRegistry,
    folders: Folders,
) -> Any:
    if link := link_of(value):
        origin, slot = link
        return [known[origin], slot]
    spec = registry[node.class_type].schema.input(name)
    return [value, _state_of_file(spec, value, folders)] if spec else value


def _state_of_file(spec: InputSpec, value: Any, folders: Folders) -> Any:
    """What changes when the file that the value names does; None if it names none."""
    try:
        if isinstance(spec.kind, ModelFile):
            return TensorFile.open(folders.model(spec.kind.folder, value)).fingerprint
        if isinstance(spec.kind, InputImage):
            return hashlib.sha256(folders.picture(*image_location(value)).read_bytes()).hexdigest()
    except (UsoflowError, OSError):  # the node itself will say what is wrong with the file
        return "unreadable"
    return None

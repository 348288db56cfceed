"""Outputs kept from run to run, by what really went into them.

The key of a node follows from its type, its values, the keys of the nodes it is linked to, and the state of
the files it names, so that a changed picture or model file is noticed under the same name. What writes files
or is not the same twice has its id in the key: of two equal nodes, each is then run.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.schema.node import AnyNode, NodeRegistry
from usoflow.schema.specs import InputImage, InputSpec, ModelFile
from usoflow.schema.values import image_location, unwrapped
from usoflow.settings import Folders
from usoflow.workflow.prompt import Prompt, PromptNode, link_of

Outputs = tuple[Any, ...]


class OutputCache:
    """Outputs by key, those of the last run's nodes and of what its prompt has besides."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Outputs, str, Mapping[Path, object]]] = {}

    def get(self, key: str) -> Outputs | None:
        """None, too, if a file that the node wrote was removed or changed meanwhile, or is another's now."""
        outputs, _, written = self._kept.get(key, (None, "", {}))
        unchanged = all(_state_of(path) == state is not None for path, state in written.items())
        return outputs if unchanged else None

    def put(self, key: str, outputs: Outputs, node: str, written: Iterable[Path]) -> None:
        """Keep the outputs of a node, by its id, that has written these files."""
        self._kept[key] = outputs, node, {path: _state_of(path) for path in written}

    def keep_only(self, keys: Collection[str], nodes: Collection[str]) -> None:
        """Forget every other output, but for those of the nodes with these ids."""
        self._kept = {key: kept for key, kept in self._kept.items() if key in keys or kept[1] in nodes}

    def clear(self) -> None:
        self._kept = {}


def _state_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file has, of a custom node
        return None
    return found.st_size, found.st_mtime_ns


def keys(
    prompt: Prompt,
    order: list[str],
    registry: NodeRegistry,
    folders: Folders,
    told: Callable[[str], Mapping[str, Any]],
) -> Mapping[str, str]:
    """The cache key of every node in `order`, in which a node follows those it is linked to.

    `told` gives what is known of a node's inputs, by its id, to nodes that say themselves what has changed.
    """
    found: dict[str, str] = {}
    for node_id in order:
        node = prompt.nodes[node_id]
        parts = {
            name: _part(node, name, value, found, registry, folders) for name, value in node.inputs.items()
        }
        entry = registry[node.class_type]
        changed = entry.changed(told(node_id)) if entry.changed else ""
        own = [node_id] if _is_unlike_others(entry) else []
        if entry.schema.output_node:  # what it wrote is where it wrote it
            own += [str(folder.absolute()) for folder in (folders.output, folders.temp)]
        text = json.dumps([node.class_type, parts, changed, own], sort_keys=True, default=str)
        found[node_id] = hashlib.sha256(text.encode()).hexdigest()
    return found


def constants(node: PromptNode) -> dict[str, Any]:
    """The inputs of a node that are values; those that are links are None, as in ComfyUI."""
    return {name: None if link_of(value) else unwrapped(value) for name, value in node.inputs.items()}


def _is_unlike_others(entry: AnyNode) -> bool:
    """Whether no other node's outputs may stand for those of a node of this type."""
    schema = entry.schema
    return schema.output_node or not entry.repeatable or "UNIQUE_ID" in schema.hidden.values()


def _part(
    node: PromptNode,
    name: str,
    value: Any,
    known: Mapping[str, str],
    registry: NodeRegistry,
    folders: Folders,
) -> Any:
    spec = registry[node.class_type].schema.input(name)
    if link := link_of(value):
        origin, slot = link
        names_file = spec is not None and isinstance(spec.kind, InputImage | ModelFile)
        # Which file that is, and so whether it changed, is only known when the origin was run.
        return [known[origin], slot, uuid.uuid4().hex if names_file else ""]
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

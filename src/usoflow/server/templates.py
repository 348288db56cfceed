"""The templates that the editor's browser offers, USO's first.

Templates whose nodes usoflow lacks, or that are for models other than FLUX, are not offered.
`sourceRevision` is left out: the editor would fetch example pictures from another host (`picture` draws
ours, and the thumbnails, which are no part of the package).
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from usoflow.errors import UsoflowError
from usoflow.schema.node import NodeRegistry
from usoflow.workflow.flatten import EDITOR_NODES
from usoflow.workflow.loading import TEMPLATE_PACKAGE, template

Json = dict[str, Any]

FAMILY: Final = "FLUX"  # how the names of models begin that usoflow runs
OURS: Final = "uso"  # part of the names of the templates that come first


class Templates:
    """What the template browser shows, found out when it is first opened."""

    def __init__(self, registry: NodeRegistry) -> None:
        self._registry = registry
        self._indexes: dict[str, list[Json]] = {}

    def index(self, name: str) -> list[Json]:
        """An index file without what cannot be run. Raises UsoflowError `template_unknown`."""
        if name not in self._indexes:
            self._indexes[name] = self._made(name)
        return self._indexes[name]

    def _made(self, name: str) -> list[Json]:
        categories = [{**c, "templates": self._usable(c["templates"])} for c in read(name)]
        filled = [category for category in categories if category["templates"]]
        return sorted(filled, key=lambda category: not _has_ours(category["templates"]))

    def _usable(self, entries: list[Json]) -> list[Json]:
        usable = [_without_source(entry) for entry in entries if self._can_run(entry)]
        return sorted(usable, key=lambda entry: not _is_ours(entry["name"]))

    def _can_run(self, entry: Json) -> bool:
        if not any(model.upper().startswith(FAMILY) for model in entry.get("models", ())):
            return False
        try:
            types = set(_node_types(template(entry["name"])))
        except UsoflowError:  # of a form that we do not read
            return False
        return types <= self._registry.keys() | set(EDITOR_NODES)


def read(name: str) -> Any:
    """A JSON file of the templates' package that is no template."""
    spec = importlib.util.find_spec(TEMPLATE_PACKAGE)
    path = Path(spec.origin).parent / "templates" / name if spec and spec.origin else None
    if path is None or not os.path.isfile(path):  # which too long a name is not either
        raise UsoflowError("template_unknown", f"There is no {name!r}.")
    return json.loads(path.read_text(encoding="utf-8"))


def _node_types(workflow: Json) -> Iterator[str]:
    """The types of all nodes, inside subgraphs too; subgraphs themselves are none."""
    subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
    own = {subgraph["id"] for subgraph in subgraphs}
    for graph in (workflow, *subgraphs):
        yield from (node["type"] for node in graph["nodes"] if node["type"] not in own)


def _without_source(entry: Json) -> Json:
    io = entry.get("io") or {}
    inputs = [{k: v for k, v in i.items() if k != "sourceRevision"} for i in io.get("inputs", [])]
    return {**entry, "io": {**io, "inputs": inputs}} if inputs else entry


def _has_ours(entries: list[Json]) -> bool:
    return any(_is_ours(entry["name"]) for entry in entries)


def _is_ours(name: str) -> bool:
    return OURS in name.split("_")

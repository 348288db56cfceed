"""The reference's node interface (names, types, ranges, options), as ComfyUI 0.8.0 answers /object_info.

`registry()` makes a registry of it whose nodes do nothing: an independent stand-in for ours.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from usoflow.schema.node import Node, NodeRegistry
from usoflow.schema.specs import (
    Boolean,
    Choice,
    Float,
    InputImage,
    InputSpec,
    Int,
    Kind,
    ModelFile,
    NodeSchema,
    OutputSpec,
    Socket,
    Text,
)

FILES = "<files>"  # stands for a list of files in the reference


class NoFiles:
    """A lister without files."""

    def list(self, folder: str) -> list[str]:
        return []

    def exists(self, folder: str, name: str) -> bool:
        return False


@cache
def reference() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "schema" / "object_info_reference.json").read_text())


@cache
def registry(without: frozenset[str] = frozenset()) -> NodeRegistry:
    names = [name for name in reference() if name not in without]
    return NodeRegistry(Node(_schema(reference()[name]), lambda *_, **__: None) for name in names)


def _schema(info: dict[str, Any]) -> NodeSchema:
    sections = info["input"]
    return NodeSchema(
        class_type=info["name"],
        category=info["category"],
        display_name=info["display_name"],
        inputs=tuple(
            InputSpec(name, _kind(entry), (entry[1:] or [{}])[0].get("default"), section == "required")
            for section in ("required", "optional")
            for name, entry in sections.get(section, {}).items()
        ),
        outputs=tuple(
            OutputSpec(name, type_) for name, type_ in zip(info["output_name"], info["output"], strict=True)
        ),
        output_node=info["output_node"],
    )


def _kind(entry: list[Any]) -> Kind:
    settings = (entry[1:] or [{}])[0]
    limits = {name: settings.get(name) for name in ("min", "max", "step")}
    match entry[0]:
        case "INT":
            return Int(**limits, control_after_generate=settings.get("control_after_generate", False))
        case "FLOAT":
            return Float(**limits, round=settings.get("round"))
        case "STRING":
            dynamic = settings.get("dynamicPrompts", False)
            return Text(multiline=settings.get("multiline", False), dynamic_prompts=dynamic)
        case "BOOLEAN":
            return Boolean()
        case "COMBO":
            return Choice(tuple(settings["options"]))
        case list(options) if options == [FILES]:
            return InputImage() if settings.get("image_upload") else ModelFile("checkpoints")
        case list(options):
            return Choice(tuple(options))
    return Socket(entry[0])

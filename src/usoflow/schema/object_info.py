"""Renders node schemas as ComfyUI's `/object_info` JSON (the V1 form), which editors build their nodes from.

Field names and forms follow what ComfyUI 0.8.0 answers; the values come from the node functions.
"""

from __future__ import annotations

from typing import Any

from usoflow.schema.node import NodeRegistry
from usoflow.schema.specs import (
    Boolean,
    Choice,
    FileLister,
    Float,
    InputImage,
    InputSpec,
    Int,
    ModelFile,
    NodeSchema,
    Socket,
    Text,
)

INPUT_FOLDER = "input"


def render_all(registry: NodeRegistry, files: FileLister) -> dict[str, Any]:
    """The whole answer: every node type by name."""
    return {name: render(entry.schema, files) for name, entry in registry.items()}


def render(schema: NodeSchema, files: FileLister) -> dict[str, Any]:
    """One node type. File lists are those of this moment."""
    sections = _sections(schema, files)
    return {
        "input": sections,
        "input_order": {section: list(entries) for section, entries in sections.items()},
        "output": [output.type for output in schema.outputs],
        "output_is_list": [False for _ in schema.outputs],
        "output_name": [output.name for output in schema.outputs],
        "name": schema.class_type,
        "display_name": schema.display_name or schema.class_type,
        "description": schema.description,
        "python_module": schema.python_module,
        "category": schema.category,
        "output_node": schema.output_node,
        "deprecated": schema.deprecated,
        "experimental": schema.experimental,
    }


def render_input(spec: InputSpec, files: FileLister) -> list[Any]:
    """One input as `[type or options, settings]`."""
    settings = _settings(spec) | dict(spec.settings)
    if spec.tooltip:
        settings["tooltip"] = spec.tooltip
    offered = options(spec, files)
    return [spec.kind.type if offered is None else offered, settings]


def options(spec: InputSpec, files: FileLister) -> list[Any] | None:
    """What a combo offers now; None for other kinds."""
    match spec.kind:
        case Choice(options=fixed):
            return list(fixed)
        case ModelFile(folder=folder):
            return list(files.list(folder))
        case InputImage():
            return list(files.list(INPUT_FOLDER))
    return None


def _sections(schema: NodeSchema, files: FileLister) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {"required": {}}
    for spec in schema.inputs:
        section = "required" if spec.required else "optional"
        sections.setdefault(section, {})[spec.name] = render_input(spec, files)
    if schema.hidden:
        sections["hidden"] = dict(schema.hidden)
    return sections


def _settings(spec: InputSpec) -> dict[str, Any]:
    match spec.kind:
        case Int() as number:
            settings = _range(spec, number)
            settings["control_after_generate"] = number.control_after_generate or None
            settings["display"] = number.display
        case Float() as number:
            settings = {**_range(spec, number), "round": number.round}
        case Text() as text:
            settings = {"default": spec.default, "multiline": text.multiline}
            settings["dynamicPrompts"] = text.dynamic_prompts or None
        case Boolean():
            settings = {"default": spec.default}
        case Choice(options=fixed):
            settings = {"default": None if spec.default in fixed[:1] else spec.default}
        case InputImage():
            settings = {"image_upload": True}
        case Socket() | ModelFile():
            settings = {}
    return {name: value for name, value in settings.items() if value is not None}


def _range(spec: InputSpec, number: Int | Float) -> dict[str, Any]:
    return {"default": spec.default, "min": number.min, "max": number.max, "step": number.step}

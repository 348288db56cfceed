"""The interface of our nodes equals the reference's: names, order, types, defaults, ranges, outputs."""

from __future__ import annotations

from typing import Any

import pytest

from reference_nodes import FILES, NoFiles, reference
from usoflow import nodes
from usoflow.schema.object_info import render_all

NUMBERS = ("min", "max", "step", "round", "control_after_generate")
NO_DEFAULT: dict[str, Any] = {
    "INT": 0,
    "FLOAT": 0.0,
    "STRING": "",
    "BOOLEAN": False,
}  # what the editor assumes
RESTRICTED_OPTIONS = {
    "CLIPLoader.type",
    "DualCLIPLoader.type",
    "UNETLoader.weight_dtype",
}  # other models' kinds


def ours() -> dict[str, Any]:
    return render_all(nodes.registry(), NoFiles())


SHARED_NAMES = sorted(set(ours()) & set(reference()))


def interface(info: dict[str, Any]) -> dict[str, Any]:
    return {
        "inputs": {
            section: {name: comparable(entry) for name, entry in info["input"].get(section, {}).items()}
            for section in ("required", "optional")
        },
        "order": {section: info["input_order"].get(section, []) for section in ("required", "optional")},
        "output": info["output"],
        "output_name": info["output_name"],
        "output_is_list": info["output_is_list"],
        "category": info["category"],
        "display_name": info["display_name"] or info["name"],
        "output_node": info["output_node"],
        "experimental": info.get("experimental", False),
        "deprecated": info.get("deprecated", False),
    }


def comparable(entry: list[Any]) -> dict[str, Any]:
    """Both forms of combos alike; defaults that the editor would assume anyway filled in."""
    type_, settings = entry[0], (entry[1:] or [{}])[0]
    options = type_ if isinstance(type_, list) else settings.get("options")
    if options is not None:
        return {"type": "COMBO", "options": [] if options == [FILES] else options, **upload(settings)}
    default = settings.get("default", NO_DEFAULT.get(type_))
    text = {name: settings.get(name, False) for name in ("multiline", "dynamicPrompts")}
    return {"type": type_, "default": default, **{name: settings.get(name) for name in NUMBERS}, **text}


def upload(settings: dict[str, Any]) -> dict[str, Any]:
    return {"image_upload": settings.get("image_upload", False)}


def compare_options(class_type: str, expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Where we support less, what we offer must be theirs in their order; then take it as equal."""
    for section, entries in expected["inputs"].items():
        for name, entry in entries.items():
            if f"{class_type}.{name}" in RESTRICTED_OPTIONS or name in ("sampler_name", "scheduler"):
                offered = got["inputs"][section][name]["options"]
                assert offered
                assert [option for option in entry["options"] if option in offered] == offered
                entry["options"] = offered


@pytest.mark.parametrize("class_type", SHARED_NAMES)
def test_interface(class_type: str) -> None:
    expected, got = interface(reference()[class_type]), interface(ours()[class_type])
    compare_options(class_type, expected, got)
    assert got == expected


def test_most_reference_nodes_are_ours() -> None:
    assert len(SHARED_NAMES) >= 70


def test_official_uso_workflow_has_all_its_nodes() -> None:
    needed = {
        "CheckpointLoaderSimple",
        "USOStyleReference",
        "ReferenceLatent",
        "EasyCache",
        "ModelPatchLoader",
    }
    assert needed <= set(SHARED_NAMES)

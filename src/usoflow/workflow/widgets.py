"""Which fields a node has, and which value each holds in a workflow file.

A file stores the fields' values as a list in the editor's order (newer files by name too), so the node type's
schema must tell the names. For a type that is not known the names come from the file as far as they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from usoflow.schema.specs import (
    Boolean,
    Choice,
    Float,
    InputImage,
    InputSpec,
    Int,
    NodeSchema,
    Text,
)
from usoflow.schema.values import wrapped
from usoflow.workflow.document import DocumentNode

CONTROL: Final = "control_after_generate"
UPLOAD: Final = "upload"
CONTROL_FILTER: Final = "control_filter_list"  # beside the control of a choice: which options it may take
CONTROL_VALUES: Final = ("fixed", "increment", "decrement", "randomize")
EDITOR_ONLY: Final = (CONTROL, UPLOAD, CONTROL_FILTER)  # fields that a prompt does not have


def known_values(node: DocumentNode, schema: NodeSchema) -> dict[str, Any]:
    """Values of the fields of a known type; defaults where the file has none.

    A file list without a stored value has no default here: the field is left out.
    """
    stored = dict(zip(names_along(node, schema), node.values, strict=False)) or node.named_values
    specs = _widgets(schema)
    stored = {name: value for name, value in stored.items() if value is not None}  # as NaN is written
    found = {spec.name: stored.get(spec.name, _default(spec)) for spec in specs}
    return {name: wrapped(value) for name, value in found.items() if value is not None}


def guessed_values(node: DocumentNode) -> dict[str, Any]:
    """Values of the fields of an unknown type, named as the file does, else UNKNOWN, UNKNOWN_1, ..."""
    values = dict(node.named_values) or dict(zip(_guessed_names(node), node.values, strict=False))
    return {name: wrapped(value) for name, value in values.items() if name not in EDITOR_ONLY}


def names_along(node: DocumentNode, schema: NodeSchema | None) -> list[str]:
    """Names of the fields along the node's stored values, with those that only the editor has."""
    if schema is None:
        return list(_guessed_names(node))
    longest = list(_layout(schema, filters=True))  # older files have no filters
    return longest if len(node.values) >= len(longest) else list(_layout(schema, filters=False))


def default(schema: NodeSchema, name: str) -> Any:
    """What a field holds that the file does not store, also one that only the editor has."""
    spec = schema.input(name)
    return _default(spec) if spec else {CONTROL: "fixed", UPLOAD: "image", CONTROL_FILTER: ""}[name]


def is_dynamic(schema: NodeSchema | None, name: str) -> bool:
    """Whether the editor resolves comments and alternatives in this field."""
    spec = schema.input(name) if schema else None
    return spec is not None and isinstance(spec.kind, Text) and spec.kind.dynamic_prompts


def _widgets(schema: NodeSchema) -> list[InputSpec]:
    """Fields in the editor's order: required ones first."""
    return sorted((spec for spec in schema.inputs if spec.is_widget), key=lambda spec: not spec.required)


def _layout(schema: NodeSchema, *, filters: bool) -> Iterator[str]:
    """Names along `widgets_values`, with the fields that only the editor has."""
    fields = _widgets(schema)
    yield from _controlled((spec for spec in fields if spec.required), filters=filters)
    if any(isinstance(spec.kind, InputImage) or spec.settings.get("image_upload") for spec in fields):
        yield UPLOAD  # the editor's last required field
    yield from _controlled((spec for spec in fields if not spec.required), filters=filters)


def _controlled(specs: Iterable[InputSpec], *, filters: bool) -> Iterator[str]:
    for spec in specs:
        yield spec.name
        if isinstance(spec.kind, Int | Choice) and spec.kind.control_after_generate:
            yield CONTROL
            if filters and isinstance(spec.kind, Choice):
                yield CONTROL_FILTER


def _default(spec: InputSpec) -> Any:
    """What the editor puts into a field that nobody filled."""
    if spec.default is not None:
        return spec.default
    match spec.kind:
        case Int() | Float():
            return 0
        case Text():
            return ""
        case Boolean():
            return False
        case Choice(options=options) if options:
            return options[0]
    return None


def _guessed_names(node: DocumentNode) -> Iterator[str]:
    """Names along the values of an unknown type: a control value betrays itself, inputs name the others."""
    named = iter([slot.widget for slot in node.inputs if slot.widget])
    unnamed = (f"UNKNOWN_{n}" if n else "UNKNOWN" for n in range(len(node.values)))
    for previous, value in zip((None, *node.values), node.values, strict=False):
        is_control = isinstance(previous, int | float) and value in CONTROL_VALUES
        yield CONTROL if is_control else next(named, None) or next(unnamed)


def by_name(names: Sequence[str], values: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values of a subgraph's own fields."""
    return dict(zip(names, values, strict=False)) or dict(named)

"""Node schemas as JSON: what the worker tells the server of nodes whose code only the worker loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from usoflow.schema.specs import KINDS, InputSpec, Kind, NodeSchema, OutputSpec

_KINDS: Final[Mapping[str, type[Kind]]] = {kind.__name__: kind for kind in KINDS}


def to_json(schema: NodeSchema) -> dict[str, Any]:
    """A schema as JSON types."""
    inputs = [{**asdict(spec), "kind": _kind_to_json(spec.kind)} for spec in schema.inputs]
    return {**asdict(schema), "inputs": inputs}


def from_json(record: Mapping[str, Any]) -> NodeSchema:
    """Back from `to_json`."""
    inputs = tuple(InputSpec(**{**spec, "kind": _kind(spec["kind"])}) for spec in record["inputs"])
    outputs = tuple(OutputSpec(**output) for output in record["outputs"])
    return NodeSchema(**{**record, "inputs": inputs, "outputs": outputs})


def _kind_to_json(kind: Kind) -> dict[str, Any]:
    return {"is": type(kind).__name__, **asdict(kind)}


def _kind(record: Mapping[str, Any]) -> Kind:
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in record.items() if name != "is"
    }
    return _KINDS[record["is"]](**values)

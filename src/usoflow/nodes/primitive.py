"""Plain values as nodes."""

from __future__ import annotations

from typing import Annotated

from usoflow.schema.node import node
from usoflow.schema.specs import Float, Int, Text

_LIMIT = 2**63 - 1


@node("PrimitiveInt", category="utils/primitive", display_name="Int")
def primitive_int(value: Annotated[int, Int(min=-_LIMIT, max=_LIMIT, control_after_generate=True)]) -> int:
    """A whole number."""
    return value


@node("PrimitiveFloat", category="utils/primitive", display_name="Float")
def primitive_float(value: Annotated[float, Float(min=-_LIMIT, max=_LIMIT, step=0.1)]) -> float:
    """A number."""
    return value


@node("PrimitiveString", category="utils/primitive", display_name="String")
def primitive_string(value: Annotated[str, Text()]) -> str:
    """A text."""
    return value


@node("PrimitiveStringMultiline", category="utils/primitive", display_name="String (Multiline)")
def primitive_text(value: Annotated[str, Text(multiline=True)]) -> str:
    """A text of several lines."""
    return value


@node("PrimitiveBoolean", category="utils/primitive", display_name="Boolean")
def primitive_boolean(value: bool) -> bool:
    """True or false."""
    return value

"""`usoflow nodes`: which nodes there are, and what one takes and gives."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer

from usoflow.cli.options import CustomNodes, node_types
from usoflow.errors import UsoflowError
from usoflow.schema.specs import Float, Int

if TYPE_CHECKING:
    from usoflow.schema.specs import InputSpec, NodeSchema


def nodes(
    name: Annotated[str | None, typer.Argument(help="A node type; without it all are listed.")] = None,
    custom_nodes: CustomNodes = None,
) -> None:
    """List the node types, or describe one."""
    known = node_types(custom_nodes)
    if name is None:
        width = max(map(len, known))
        for class_type, entry in sorted(known.items(), key=lambda item: (item[1].schema.category, item[0])):
            print(f"{class_type:<{width}}  {entry.schema.category}")
        return
    schema = known.schema(name)
    if schema is None:
        written = {node.lower(): node for node in known}
        alike = get_close_matches(name.lower(), written, n=1)
        meant = f" Did you mean {written[alike[0]]}?" if alike else ""
        raise UsoflowError("node_unknown", f"There is no node {name}.{meant}")
    _describe(schema)


def _describe(schema: NodeSchema) -> None:
    print(f"{schema.class_type} ({schema.category})\n{schema.description}\n\ninputs")
    width = max((len(spec.name) for spec in schema.inputs), default=0)
    for spec in schema.inputs:
        print(f"  {spec.name:<{width}}  {_kind(spec)}" + (f"  {spec.tooltip}" if spec.tooltip else ""))
    print("outputs")
    for output in schema.outputs:
        print(f"  {output.name}")
    if schema.output_node:
        print("  none: it saves or shows")


def _kind(spec: InputSpec) -> str:
    """Type, default, range and options of an input in one line."""
    kind = spec.kind
    words = [kind.type if spec.required else f"{kind.type} (optional)"]
    if (folder := getattr(kind, "folder", None)) is not None:
        words.append(f"a file of {folder}/")
    if options := getattr(kind, "options", ()):
        words.append("one of " + ", ".join(dict.fromkeys(map(str, options))))
    if isinstance(kind, Int | Float) and kind.min is not None:
        words.append(f"{kind.min} to {kind.max}")
    if spec.default is not None and spec.is_widget:
        words.append(f"default {spec.default!r}")
    return ", ".join(words)

"""Results that are shown or sent, and leave no file."""

from __future__ import annotations

import io
import json
import uuid
from dataclasses import replace
from typing import Annotated, Any

from usoflow.nodes.context import NodeContext, Shown
from usoflow.nodes.sockets import Image
from usoflow.schema.node import AnyNode, node
from usoflow.schema.specs import ANY_TYPE, Socket

_COMPRESSION = 1  # it is not far to the client, mostly


def _each_time(entry: AnyNode) -> AnyNode:
    """A node that runs in every run, whatever is known."""
    return replace(entry, changed=lambda values: uuid.uuid4().hex)


@_each_time
@node("SaveImageWebsocket", category="api/image", output_node=True)
def send_image(images: Image, *, context: NodeContext) -> tuple[()]:
    """Sends pictures to the client over its WebSocket, as PNG; nothing is written."""
    from usoflow.nodes.pictures import in_8_bits

    for number, picture in enumerate(in_8_bits(images.cpu().numpy()), start=1):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=_COMPRESSION)
        context.report(number, len(images), None, buffer.getvalue())
    return ()


@node("PreviewAny", category="utils", display_name="Preview as Text", output_node=True)
def preview_any(source: Annotated[Any, Socket(ANY_TYPE)]) -> Shown:
    """Shows any value as a text: JSON where it can be that."""
    return Shown(other={"text": [source if isinstance(source, str) else _text(source)]})


def _text(value: Any) -> str:
    if value is None or isinstance(value, int | float):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # tensors, handles of models; what refers to itself
        return str(value)

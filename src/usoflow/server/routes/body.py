"""JSON bodies, whatever content type they are sent with, and numbers in queries."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from fastapi import Depends, Request

from usoflow.errors import UsoflowError
from usoflow.workflow.loading import read_json

HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # the escape of a surrogate, with its other half or without


async def _json(request: Request) -> Any:
    data = await request.body()
    if not data:
        return None
    try:
        decoded = read_json(data)
    except UsoflowError as error:
        reason = error.__context__ or error.detail  # the detail is about files, which may be pictures too
        raise UsoflowError("body_invalid", f"The body is not JSON: {reason}.") from None
    return _whole_characters(decoded) if HALF.search(data) else decoded


def _whole_characters(decoded: Any) -> Any:
    """Half an emoji, as programs leave it that cut texts, becomes U+FFFD: no answer could hold it."""
    text = json.dumps(decoded, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


async def _object(request: Request) -> dict[str, Any]:
    body = await _json(request)
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise UsoflowError("body_invalid", "The body is not a JSON object.")
    return body


AnyBody = Annotated[Any, Depends(_json)]
"""Decoded JSON; None for an empty body. Raises UsoflowError `body_invalid`."""

ObjectBody = Annotated[dict[str, Any], Depends(_object)]
"""A JSON object; an empty one for an empty body."""


def names(body: dict[str, Any], key: str) -> list[str]:
    """The texts in a list of the body."""
    values = body.get(key)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []

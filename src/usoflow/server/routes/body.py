"""JSON bodies, whatever content type they are sent with, and numbers in queries."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from usoflow.errors import UsoflowError
from usoflow.server.context import MIB
from usoflow.service.engine import whole_characters
from usoflow.workflow.loading import read_json, text_of

LARGE = MIB  # bytes that take long enough to decode that nobody else is to wait for it


async def _json(request: Request) -> Any:
    data = await request.body()
    return await run_in_threadpool(_decoded, data) if len(data) > LARGE else _decoded(data)


def _decoded(data: bytes) -> Any:
    if not data:
        return None
    try:
        text = text_of(data)
        decoded = read_json(text)
    except UsoflowError as error:
        reason = error.__context__ or error.detail  # the detail is about files, which may be pictures too
        raise UsoflowError("body_invalid", f"The body is not JSON: {reason}.") from None
    return whole_characters(decoded, text)


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

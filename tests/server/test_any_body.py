"""Whatever is sent is answered: no body is a 500, and the next prompt runs."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.conftest import ended, prompt, submit

POSTED = (
    "/prompt", "/queue", "/history", "/interrupt", "/free", "/settings", "/settings/Comfy.Any",
    "/jobs/cancel",
)  # fmt: skip
WORDS = (
    "prompt", "prompt_id", "client_id", "extra_data", "extra_pnginfo", "workflow", "number", "front", "clear",
    "delete", "partial_execution_targets", "job_ids", "unload_models", "free_memory", "class_type", "inputs",
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(WORDS)
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
LASTING = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(client: TestClient, path: str, body: Any) -> None:
    """A refusal says why. NaN and infinity are sent as Python writes them."""
    answer = client.post(
        path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code >= 400:
        assert answer.json()["error"], (path, body)


@pytest.mark.parametrize("path", POSTED)
def test_any_json(client: TestClient, path: str) -> None:
    @LASTING
    @given(VALUES)
    def send(body: Any) -> None:
        check(client, path, body)

    send()
    assert ended(client, submit(client))["status"] == "completed"


def test_a_prompt_of_which_something_is_another(client: TestClient) -> None:
    """Any value at any place of a body that would be taken."""
    whole = {
        "prompt": prompt(),
        "client_id": "a",
        "extra_data": {"extra_pnginfo": {"workflow": {}}},
        "number": 1,
    }
    places = [path for path in paths(whole) if path]

    @LASTING
    @given(st.sampled_from(places), VALUES)
    def send(place: tuple[Any, ...], value: Any) -> None:
        body = copy.deepcopy(whole)
        inside: Any = body
        for step in place[:-1]:
            inside = inside[step]
        inside[place[-1]] = value
        check(client, "/prompt", body)

    send()
    assert ended(client, submit(client))["status"] == "completed"


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything inside a JSON value, itself first."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(found for step, inner in steps for found in paths(inner, (*before, step)))]

"""A store and prompts for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from usoflow.service.store import JobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    """An empty store in a folder of its own."""
    found = JobStore(tmp_path / "state" / "jobs.sqlite")
    yield found
    found.close()

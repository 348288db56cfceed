"""A context as the executor lends it to nodes, on the small models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.nodes.context import NodeContext
from usoflow.settings import find_folders


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small lose more by sharing than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def context(small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeContext:
    """Reads the small models and their pictures, writes below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return NodeContext(
        folders=find_folders(
            models=small_models, inputs=small_models.parent / "input", output=tmp_path / "output"
        ),
        library=ModelLibrary(Placement.choose("cpu", "fp32")),
        report=lambda *progress: None,
        prompt={"1": {"class_type": "X", "inputs": {}}},
        workflow=None,
    )

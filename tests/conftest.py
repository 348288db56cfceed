"""Fixtures that several test modules share: the synthetic model tree and the reference's outputs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor

from golden import synth
from golden.compare import Golden
from untrained import write_untrained
from usoflow.file_lock import taken

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"
CACHE_VARIABLE = "USOFLOW_TEST_CACHE"

# No deadlines: machines are busy. CI draws the same examples each time, so that what fails there was changed;
# everywhere else each run draws new ones.
settings.register_profile("anywhere", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "anywhere")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the reference material, tests that need it are deselected and reported so."""
    if SHARED.is_dir():
        return
    needing = [item for item in items if item.get_closest_marker("shared")]
    config.hook.pytest_deselected(items=needing)
    items[:] = [item for item in items if item not in needing]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material beside the repository (tests that use it are marked `shared`)."""
    return SHARED


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("dit").check(name, array, rtol)`: the reference's outputs of a stage."""
    return lambda stage: Golden(stage, str(GOLDEN))


@pytest.fixture(scope="session")
def synthetic() -> Callable[..., Tensor]:
    """`synthetic(name, shape, scale)`: the inputs of the goldens."""

    def make(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.from_numpy(synth.tensor(name, shape, (scale, 0.0)))

    return make


@pytest.fixture(scope="session")
def synth_models() -> Path:
    """The synthetic model tree, written once and kept in the user's cache directory.

    Its sibling `input` has the pictures. USOFLOW_TEST_CACHE names another place.
    """
    cache = Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_path("usoflow-tests"))
    models = cache / "models"
    done = models / ".complete"
    models.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        while not taken(lock.fileno()):  # another process of these tests writes it
            time.sleep(1)
        if not done.exists():
            command = [sys.executable, GOLDEN / "synth.py", models]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            done.touch()
    return models


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models of the official layout that run in a second; not to be changed.

    The sibling `input` has `subject.png`, 80x48, and `style.png`, 64x64.
    """
    root = tmp_path_factory.mktemp("small")
    write_untrained(root / "models")
    (root / "input").mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("subject", (48, 80, 3)), ("style", (64, 64, 3))):
        pixels = generator.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(root / "input" / f"{name}.png")
    return root / "models"

"""States of training on the disk: whole or not at all, and never of weights that are no numbers."""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.placement import is_out_of_memory
from usoflow.training.kept import unwritable, whole


def require_finite_weights(values: Iterable[Tensor], done: int, remedy: str) -> None:
    """Before a state is replaced: weights that are no numbers would never be numbers again.

    Raises:
        UsoflowError: "non_finite".
    """
    if not all(bool(value.isfinite().all()) for value in values):
        raise UsoflowError(
            "non_finite",
            f"Weights are not finite after {done} samples; they are not saved, an earlier state is kept.",
            remedy=remedy,
        )


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """An old state is replaced only by a complete new one.

    Raises:
        UsoflowError: "output_unwritable", as on a full disk.
    """
    try:
        with whole(path) as partial:
            torch.save(dict(state), partial)
    except RuntimeError as error:  # torch's writer, whatever the system said
        if is_out_of_memory(error):
            raise
        raise unwritable(path, error) from None


@contextmanager
def read_state(path: Path) -> Iterator[dict[str, Any]]:
    """A state to put back, on the CPU; what cannot be read or does not fit is `training_config`."""
    try:
        yield torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        raise UsoflowError(
            "training_config",
            f"{path} is damaged or of other settings: {textwrap.shorten(str(error), 300)}.",
            remedy="Go on with the settings it was begun with, or move it away to begin anew.",
        ) from None


def require_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError naming what a state was begun with otherwise; called within `read_state`."""
    changed = sorted(name for name, value in settings.items() if state["settings"][name] != value)
    if changed:
        raise ValueError(", ".join(changed))

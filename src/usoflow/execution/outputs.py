"""What nodes give one another: tensors, also in lists and dictionaries (IMAGE, LATENT, CONDITIONING)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from usoflow.errors import UsoflowError


def copied(value: Any) -> Any:
    """What a custom node may change in place, as some do, while the original is kept for other nodes."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value  # handles cannot be changed; classes of its own are a custom node's own affair


def check_finite(outputs: Any) -> None:
    """Raise UsoflowError `non_finite` where a number is none, or without end."""
    for tensor in _tensors(outputs):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UsoflowError("non_finite", "its result has values that are not finite.")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)

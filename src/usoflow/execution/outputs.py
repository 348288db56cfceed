"""What nodes give one another: tensors, also in lists and dictionaries (IMAGE, LATENT, CONDITIONING).

The shapes are the ecosystem's: https://docs.comfy.org/custom-nodes/backend/datatypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.schema.specs import OutputSpec

NUMBERS: Final = ("IMAGE", "MASK", "LATENT", "CONDITIONING")  # the types whose numbers must be finite


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
    if not _is_finite(outputs):
        raise UsoflowError("non_finite", "its result has values that are not finite.")


def check_custom(outputs: Sequence[Any], specs: Sequence[OutputSpec]) -> None:
    """The same for what a custom node gives; types of its own may hold what they like.

    Raises:
        UsoflowError: `custom_node_failed`.
    """
    for number, (value, spec) in enumerate(zip(outputs, specs, strict=False)):
        if spec.type in NUMBERS and not _is_finite(value):
            what = f"its output {number} ({spec.type}) has values that are not finite."
            raise UsoflowError("custom_node_failed", what)


def misfit(type_: str, value: Any) -> str | None:
    """Why what a custom node gives is not of the type that it promises, as far as that can be seen."""
    if value is None:
        return "None"
    sides = value.ndim if isinstance(value, Tensor) else None
    match type_:
        case "IMAGE" if sides != 4:
            return f"{_kind(value)} instead of a tensor [B, H, W, C]"
        case "MASK" if sides not in (2, 3, 4):
            return f"{_kind(value)} instead of a tensor [B, H, W]"
        case "LATENT" if not (isinstance(value, dict) and isinstance(value.get("samples"), Tensor)):
            return f'{_kind(value)} instead of {{"samples": tensor [B, C, H, W]}}'
        case "CONDITIONING" if not isinstance(value, list | tuple):
            return f"{_kind(value)} instead of a list of pairs (tensor, dict)"
    return None


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def _is_finite(value: Any) -> bool:
    tensors = (tensor for tensor in _tensors(value) if tensor.is_floating_point())
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


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

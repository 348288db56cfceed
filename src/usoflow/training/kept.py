"""What training keeps on disk: files that are whole or not there, and what tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what shall lie at `path`: it is moved there once it is complete.

    So what is there was never cut short by an interruption or a full disk, and may be the sign that a stage
    is done. Its name ends as that of `path`, for what goes by the ending.
    """
    partial = path.with_name(f"part-{path.name}")
    yield partial
    partial.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file."""
    with whole(path) as partial:
        save_file(dict(tensors), partial, metadata=metadata)


def fingerprint(*made_by: nn.Module | str | int) -> str:
    """What tells results apart: the weights of what made them, and settings."""
    digest = hashlib.sha256()
    for part in made_by:
        if isinstance(part, nn.Module):
            for name, parameter in part.named_parameters():
                data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(name.encode())
                digest.update(data.numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()

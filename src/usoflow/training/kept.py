"""What training keeps on disk: files that are whole or not there, arrays, and what tells them apart."""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from usoflow import durable
from usoflow.errors import UsoflowError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what shall lie at `path`: it is moved there once it is complete.

    So what is there was never cut short by an interruption or a full disk, and may be the sign that a stage
    is done. Its name ends as that of `path`, for what goes by the ending.

    Raises:
        UsoflowError: "output_unwritable", as on a full disk.
    """
    partial = path.with_name(f"part-{path.name}")
    try:
        yield partial
        durable.put(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise unwritable(path, error) from None
        raise


def new_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array in a new file, mapped to be written.

    Its room on the disk is taken at once: a map that finds a full disk ends the process (SIGBUS).

    Raises:
        UsoflowError: "output_unwritable" if there is not so much.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                path.unlink()
                remedy = f"Have {array.nbytes / 1e9:.1f} GB free there."
                raise unwritable(path, error, remedy=remedy) from None
    return array


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file.

    Raises:
        UsoflowError: "output_unwritable".
    """
    with whole(path) as partial:
        save_file(dict(tensors), partial, metadata=metadata)


def unwritable(path: Path, error: Exception, *, remedy: str | None = None) -> UsoflowError:
    """The error of a file that cannot be written, in whatever words that is told."""
    reason = getattr(error, "strerror", None) or textwrap.shorten(str(error), 200)
    return UsoflowError("output_unwritable", f"{path} cannot be written: {reason}.", remedy=remedy)


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

"""GGUF files: their tensors' names, shapes and formats, and their data, through PyPI's `gguf`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf` is an extra: imported when such a
file is met. No torch here; `weights.read_tensors` makes tensors of the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from usoflow.errors import UsoflowError

MAGIC: Final = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def shapes_and_formats(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape (as torch has it) and format name of each tensor.

    Raises:
        UsoflowError: `extra_missing`, `model_damaged`.
    """
    return {
        tensor.name: (tuple(int(side) for side in reversed(tensor.shape)), tensor.tensor_type.name)
        for tensor in _reader(path).tensors
    }


def arrays(path: Path, names: Iterable[str]) -> dict[str, tuple[Any, str]]:
    """Data of tensors as memory-mapped numpy arrays, with the format's name.

    Raises:
        UsoflowError: `extra_missing`, `model_damaged`.
    """
    found = {tensor.name: tensor for tensor in _reader(path).tensors}
    return {name: (found[name].data, found[name].tensor_type.name) for name in names}


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UsoflowError(
            "extra_missing", f"{path.name} is a GGUF file.", remedy='pip install "usoflow[gguf]"'
        ) from None
    try:
        return GGUFReader(path, mode="c")  # copy on write: torch takes no read-only memory
    except Exception as error:  # the library raises whatever its numpy calls do
        raise UsoflowError("model_damaged", f"{path.name} is not a valid GGUF file: {error}.") from None

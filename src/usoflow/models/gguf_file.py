"""GGUF files: their tensors' names, shapes, formats and places, through PyPI's `gguf`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf` is an extra: imported when such a
file is met. No torch here; `weights.read_tensors` reads the data.
"""

from __future__ import annotations

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


def entries(path: Path) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Shape (as torch has it), format's name and first byte in the file of each tensor.

    Raises:
        UsoflowError: `extra_missing`, `model_damaged`.
    """
    return {
        tensor.name: (
            tuple(int(side) for side in reversed(tensor.shape)),
            tensor.tensor_type.name,
            int(tensor.data_offset),
        )
        for tensor in _reader(path).tensors
    }


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UsoflowError(
            "extra_missing", f"{path.name} is a GGUF file.", remedy='pip install "usoflow[gguf]"'
        ) from None
    try:
        return GGUFReader(path)
    except Exception as error:  # the library raises whatever its numpy calls do
        raise UsoflowError("model_damaged", f"{path.name} is not a valid GGUF file: {error}.") from None

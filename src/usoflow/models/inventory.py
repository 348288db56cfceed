"""Which model files there are, and what each holds: from headers alone, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.tensor_header import TensorInfo
from usoflow.settings import MODEL_FOLDERS, Folders

_WORTH_SAYING = 0.005  # part of the bytes below which a precision is left out


@dataclass(frozen=True, slots=True)
class Found:
    """A file in a model folder.

    Attributes:
        folder: kind of folder.
        name: as a loader node names it.
        path: where it is.
        bytes: its size.
        contents: what it holds, in words.
        precision: number formats by their part of the bytes, the largest first.
        problem: why it cannot be used; empty where nothing is wrong with its header.
    """

    folder: str
    name: str
    path: Path
    bytes: int
    contents: str
    precision: str
    problem: str


def found_files(folders: Folders) -> Iterator[Found]:
    """Every file of every kind of model folder."""
    for folder in MODEL_FOLDERS:
        for name in folders.list(folder):
            yield _found(folder, name, folders.model(folder, name))


def precision(tensors: Iterable[TensorInfo]) -> str:
    """'F8_E4M3 99 %, F32 1 %'."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.bytes
    total = sum(sizes.values()) or 1
    shares = [(dtype, size / total) for dtype, size in sizes.most_common()]
    return ", ".join(f"{dtype} {share:.0%}" for dtype, share in shares if share >= _WORTH_SAYING)


def _found(folder: str, name: str, path: Path) -> Found:
    try:
        file = TensorFile.open(path)
        file.components()
    except UsoflowError as error:
        size = path.stat().st_size if path.exists() else 0
        return Found(folder, name, path, size, "", "", error.detail)
    held = precision(file.tensors.values())
    return Found(folder, name, path, file.bytes, file.describe(), held, "")

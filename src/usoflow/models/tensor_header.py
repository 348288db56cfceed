"""The headers of model files: which tensors, of which shape and format, and where their data lies.

Safetensors (https://huggingface.co/docs/safetensors/index#format: 8-byte little-endian header length, JSON
header, data) and GGUF (`gguf_file`). No torch, no tensor data; `checkpoint` tells which models these are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from usoflow.errors import UsoflowError, some
from usoflow.models.gguf_file import entries, is_gguf

MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library sets itself

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
        "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A quantised format of GGUF files: so many values in so many bytes."""

    values: int
    bytes: int


QUANTISED: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q8_0": BlockFormat(32, 34),
        "Q5_0": BlockFormat(32, 22),
        "Q4_0": BlockFormat(32, 18),
        "Q6_K": BlockFormat(256, 210),
        "Q5_K": BlockFormat(256, 176),
        "Q4_K": BlockFormat(256, 144),
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header: shape, name of its dtype (`F8_E4M3`, `BF16`, ...; GGUF: `Q8_0`, ...), and where
    in the file its data starts, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def bytes(self) -> int:
        """How many bytes its data takes."""
        if block := QUANTISED.get(self.dtype):
            return prod(self.shape) // block.values * block.bytes
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors by name, and the metadata, of a file of so many bytes.

    Raises:
        UsoflowError: `model_missing`, `model_pickle`, `model_damaged`, `model_truncated`,
            `model_unsupported`, `extra_missing`.
    """
    if is_gguf(path):
        return _of_gguf(path), {}
    header, start = _parsed(path, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata is not an object")
    tensors = {name: _tensor_info(path, name, entry, start, size) for name, entry in header.items()}
    _refuse_overlap(path, tensors)
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _of_gguf(path: Path) -> dict[str, TensorInfo]:
    tensors = {name: TensorInfo(*entry) for name, entry in entries(path).items()}
    unknown = {info.dtype for info in tensors.values()} - {*QUANTISED, *DTYPE_BYTES}
    if unknown:
        raise UsoflowError(
            "model_unsupported",
            f"{path.name} has tensors in {some(sorted(unknown))}.",
            remedy=f"Use a file in {', '.join(QUANTISED)}.",
        )
    return tensors


def _parsed(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data behind it starts."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            _refuse_pickle(path, start + stream.read(1))
            stream.seek(8)
            if len(start) < 8:
                raise UsoflowError("model_truncated", f"{path.name} has only {len(start)} bytes.")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES:
                raise _came_instead(path, start) or _damaged(path, f"it announces a header of {length} bytes")
            text = stream.read(length)
    except OSError as error:
        raise UsoflowError("model_missing", f"{path} cannot be read: {error.strerror or error}.") from None
    if len(text) < length:
        raise UsoflowError("model_truncated", f"{path.name} ends inside its header ({size} bytes).")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, 8 + length


def _tensor_info(path: Path, name: str, entry: object, start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
        if dtype not in DTYPE_BYTES and isinstance(dtype, str):
            raise UsoflowError(
                "model_unsupported",
                f"{path.name} has tensors in {dtype}.",
                remedy="Use a file in fp32, bf16, fp16 or fp8 (e4m3, e5m2).",
            )
        expected = prod(shape) * DTYPE_BYTES[dtype]
        consistent = 0 <= begin <= end and end - begin == expected and all(side >= 0 for side in shape)
    except (KeyError, TypeError, ValueError, IndexError):
        raise _damaged(path, f"the entry of tensor {name!r} cannot be read") from None
    if not consistent:
        raise _damaged(path, f"tensor {name!r} does not have the size that its shape tells")
    if start + end > size:
        raise UsoflowError(
            "model_truncated",
            f"{path.name} ends before tensor {name!r}: {start + end - size} bytes are missing.",
        )
    return TensorInfo(shape, dtype, start + begin)


def _refuse_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """As the safetensors library does: no byte is two tensors'."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if info.start < end:
            raise _damaged(path, f"tensor {name!r} begins inside another")
        end = info.start + info.bytes


def _refuse_pickle(path: Path, start: bytes) -> None:
    """Pickles and the zip files that torch.save writes execute code when loaded: never opened.

    A header length may begin with a pickle's first byte; but only a header has "{" after its length.
    """
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:9] != b"{"):
        raise UsoflowError("model_pickle", f"{path.name} is a pickled PyTorch file, which can execute code.")


def _came_instead(path: Path, start: bytes) -> UsoflowError | None:
    """What a download that went wrong has left, by the first eight bytes, which are no length."""
    if start == b"version ":  # https://git-lfs.com
        what, advice = "is only a Git LFS pointer, not the model itself", "Fetch it with `git lfs pull`."
    elif start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        what = "is a web page, not a model"
        advice = "Download it again; where a licence is agreed to on the site, it needs a login (HF_TOKEN)."
    else:
        return None
    return UsoflowError("model_damaged", f"{path.name} {what}.", remedy=advice)


def _damaged(path: Path, why: str) -> UsoflowError:
    return UsoflowError("model_damaged", f"{path.name} is not a valid safetensors file: {why}.")

"""What is in this file? Safetensors headers, and the models recognised in them by their tensor names.

Also GGUF files (`gguf_file`). Reads headers only (no torch, no tensor data), so that the command line can
tell in milliseconds which models a folder holds. `weights.assemble` reads the
tensors of a `Component` into a module.

Format: https://huggingface.co/docs/safetensors/index#format (8-byte little-endian header length, JSON
header, data). Layouts: ComfyUI's all-in-one checkpoint and the split files of black-forest-labs/flux,
comfyanonymous/flux_text_encoders, Comfy-Org/sigclip_vision_384 and bytedance-research/USO.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from usoflow.errors import UsoflowError
from usoflow.models.gguf_file import entries, is_gguf
from usoflow.models.kinds import (
    IGNORED_ANYWHERE,
    KIND_NAMES,
    OF_DIFFUSERS,
    OTHER_FAMILIES,
    SIGNATURES,
    SINGLE_FILES,
)

T = TypeVar("T", int, float, tuple[int, ...])

CONFIG_KEY = "usoflow.config"  # safetensors metadata: JSON object, one section per component
SCALE = "scale_weight"  # beside a weight in fp8: what its numbers are multiplied by
_SCALE_TOO = "weight_scale"  # the same, as newer files spell it
_PART = re.compile(r"-\d{5}-of-\d{5}\.")  # in the name of one file of a model that Hugging Face has split
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


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of which only the header has been read.

    `fingerprint` changes when the file does: (path, size in bytes, modification time in ns).
    """

    path: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    fingerprint: tuple[str, int, int]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header of `path`.

        Raises:
            UsoflowError: `model_missing`, `model_pickle`, `model_damaged`, `model_truncated`.
        """
        fingerprint = _fingerprint(path)
        return _open_cached(path, fingerprint)

    @property
    def bytes(self) -> int:
        return self.fingerprint[1]

    def components(self) -> Mapping[str, Component]:
        """The models in this file by kind (keys of `SIGNATURES`).

        Raises:
            UsoflowError: `tensor_unknown` if a tensor belongs to no recognised model; `model_damaged` for
                declarations that are none.
        """
        return self._components

    def component(self, kind: str) -> Component:
        """The model of this kind.

        Raises:
            UsoflowError: `model_kind` if the file holds none, naming what it holds instead; `tensor_unknown`,
                `model_damaged`.
        """
        if kind not in self._prefixes or self.of_diffusers():
            raise UsoflowError(
                "model_kind",
                f"{self.path.name} holds no {KIND_NAMES[kind]}; it holds {self.describe()}.",
                remedy=SINGLE_FILES if self.of_diffusers() else None,
            )
        return self.components()[kind]

    def describe(self) -> str:
        """What the file holds, in words: 'FLUX.1 transformer, FLUX VAE' or 'nothing usoflow knows'."""
        if self.of_diffusers():
            return "a model in the layout of diffusers"
        held = [KIND_NAMES[kind] for kind in self._prefixes]
        others = [OTHER_FAMILIES[kind][1] for kind in self._others]
        return ", ".join([*held, *others]) or "nothing usoflow knows"

    @property
    def one_of_several(self) -> str | None:
        """What to do where the name tells that this is a part of a model; else None."""
        if not _PART.search(self.path.name):
            return None
        return (
            "This is one part of several. Use a file that holds all: `usoflow models` names the tutorial's."
        )

    def of_diffusers(self) -> bool:
        """A LoRA may have diffusers' names for the layers that it changes."""
        return any(OF_DIFFUSERS.match(name) for name in self.tensors) and self._prefix("lora") is None

    @functools.cached_property
    def _components(self) -> Mapping[str, Component]:
        found = self._prefixes
        self._refuse_strays(found)
        return MappingProxyType({kind: self._component(kind, prefix) for kind, prefix in found.items()})

    @functools.cached_property
    def _prefixes(self) -> Mapping[str, str]:
        """The kinds of model in this file, with what precedes the names of their tensors."""
        found = {kind: prefix for kind in SIGNATURES if (prefix := self._prefix(kind)) is not None}
        if "uso_lora" in found:  # its further pairs may have the names of other trainers
            found.pop("lora", None)
        return found

    @property
    def _others(self) -> Mapping[str, str]:
        """The kinds of which the file holds one of another family, with what precedes its names."""
        signed = ((kind, self._signed(kind)) for kind in OTHER_FAMILIES)
        return {k: prefix for k, prefix in signed if prefix is not None and self._of_other_family(k, prefix)}

    def _prefix(self, kind: str) -> str | None:
        prefix = self._signed(kind)
        return None if prefix is None or self._of_other_family(kind, prefix) else prefix

    def _signed(self, kind: str) -> str | None:
        matches = (SIGNATURES[kind].match(name) for name in self.tensors)
        return next((match.group(1) for match in matches if match), None)

    def _of_other_family(self, kind: str, prefix: str) -> bool:
        """Whether what is recognised as a kind has a tensor that those of FLUX.1 and USO have not."""
        return kind in OTHER_FAMILIES and prefix + OTHER_FAMILIES[kind][0] in self.tensors

    def _refuse_strays(self, found: Mapping[str, str]) -> None:
        if not found:
            return
        prefixes = (*found.values(), *self._others.values())
        strays = [
            n for n in self.tensors if not n.startswith(prefixes) and not matches_any(n, IGNORED_ANYWHERE)
        ]
        if strays:
            raise UsoflowError(
                "tensor_unknown",
                f"{self.path.name} has {len(strays)} tensors that belong to no model in it: {some(strays)}.",
            )

    def _component(self, kind: str, prefix: str) -> Component:
        inner = tuple(p for p in self._prefixes.values() if len(p) > len(prefix) and p.startswith(prefix))
        own = (n for n in self.tensors if n.startswith(prefix) and not (inner and n.startswith(inner)))
        tensors = {n[len(prefix) :]: self.tensors[n] for n in own}
        tensors = {n: info for n, info in tensors.items() if not matches_any(n, IGNORED_ANYWHERE)}
        return Component(self, kind, prefix, _with_usual_scales(tensors), self._declared(kind))

    def _declared(self, kind: str) -> Mapping[str, Any]:
        text = self.metadata.get(CONFIG_KEY)
        if text is None:
            return {}
        try:
            config = json.loads(text)
            section = config.get(kind, {})
        except (ValueError, AttributeError):
            section = None
        if not isinstance(section, dict):
            raise UsoflowError(
                "model_damaged", f"{self.path.name}: {CONFIG_KEY} metadata is not a JSON object."
            )
        return section


@dataclass(frozen=True)
class Component:
    """The tensors of one model in one file.

    Attributes:
        file: the file they are in.
        kind: a key of `SIGNATURES`.
        prefix: what precedes the names in the file.
        tensors: shape and dtype by name, without the prefix.
        declared: what the file itself declares of this model in `usoflow.config` (no shape tells it).
    """

    file: TensorFile
    kind: str
    prefix: str
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    declared: Mapping[str, Any] = field(repr=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def setting(self, name: str, default: T) -> T:
        """What the file declares of the model under this name, else the default (the official value).

        Raises:
            UsoflowError: `model_damaged` if it declares something that is no value like the default.
        """
        value = self.declared.get(name, default)
        try:
            return tuple(int(item) for item in value) if isinstance(default, tuple) else type(default)(value)
        except (TypeError, ValueError):
            raise UsoflowError(
                "model_damaged", f"{self.file.path.name} declares {self.kind} {name} = {value!r}."
            ) from None

    def shape(self, name: str, sides: int) -> tuple[int, ...]:
        """Shape of a tensor that the model cannot be without; it has so many sides, none of them 0.

        Raises:
            UsoflowError: `tensor_missing`, `tensor_shape`.
        """
        if name not in self.tensors:
            raise UsoflowError(
                "tensor_missing",
                f"{self.file.path.name} lacks the tensor {self.prefix}{name}.",
                remedy=self.file.one_of_several,
            )
        shape = self.tensors[name].shape
        if len(shape) != sides or 0 in shape:
            raise UsoflowError(
                "tensor_shape",
                f"{self.file.path.name}: {self.prefix}{name} is {list(shape)}, not of {sides} sides.",
            )
        return shape

    def count(self, pattern: str) -> int:
        """Number of blocks: `count("double_blocks.{}.")` for names that begin so; 0 if there are none.

        Raises:
            UsoflowError: `block_gap` if the numbers do not run from 0 without a gap.
        """
        before, after = (re.escape(part) for part in pattern.split("{}"))
        numbered = re.compile(f"{before}(\\d{{1,18}}){after}")
        found = {int(match.group(1)) for name in self.tensors if (match := numbered.match(name))}
        missing = next(number for number in itertools.count() if number not in found)
        if missing < len(found):
            last, first = pattern.format(max(found)), pattern.format(missing)
            raise UsoflowError("block_gap", f"{self.file.path.name} has {last}* but no {first}*.")
        return len(found)


def _with_usual_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Scales of fp8 weights under one name, whichever of the two the file gives them."""
    found = {}
    for name, info in tensors.items():
        stem, _, leaf = name.rpartition(".")
        weight = tensors.get(f"{stem}.weight")
        of_fp8 = leaf == _SCALE_TOO and weight is not None and weight.dtype.startswith("F8")
        found[f"{stem}.{SCALE}" if of_fp8 else name] = info
    return found


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor name matches one of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, for a message."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _fingerprint(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UsoflowError("model_missing", f"{path} cannot be read: {error.strerror}.") from None
    return (str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _open_cached(path: Path, fingerprint: tuple[str, int, int]) -> TensorFile:
    if is_gguf(path):
        return _open_gguf(path, fingerprint)
    header, start = _read_header(path, fingerprint[1])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata is not an object")
    tensors = {name: _tensor_info(path, name, entry, start, fingerprint[1]) for name, entry in header.items()}
    _refuse_overlap(path, tensors)
    texts = {str(key): str(value) for key, value in metadata.items()}
    return TensorFile(path, MappingProxyType(tensors), MappingProxyType(texts), fingerprint)


def _open_gguf(path: Path, fingerprint: tuple[str, int, int]) -> TensorFile:
    tensors = {name: TensorInfo(*entry) for name, entry in entries(path).items()}
    unknown = {info.dtype for info in tensors.values()} - {*QUANTISED, *DTYPE_BYTES}
    if unknown:
        raise UsoflowError(
            "model_unsupported",
            f"{path.name} has tensors in {some(sorted(unknown))}.",
            remedy=f"Use a file in {', '.join(QUANTISED)}.",
        )
    return TensorFile(path, MappingProxyType(tensors), MappingProxyType({}), fingerprint)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
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
                raise _damaged(path, f"it announces a header of {length} bytes")
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


def _damaged(path: Path, why: str) -> UsoflowError:
    return UsoflowError("model_damaged", f"{path.name} is not a valid safetensors file: {why}.")

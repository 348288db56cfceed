"""What is in this file? The models in it, recognised by the names of their tensors.

Reads headers only (`tensor_header`), so that the command line can tell in milliseconds which models a folder
holds. `weights.assemble` reads the tensors of a `Component` into a module.

Layouts: ComfyUI's all-in-one checkpoint and the split files of black-forest-labs/flux,
comfyanonymous/flux_text_encoders, Comfy-Org/sigclip_vision_384 and bytedance-research/USO.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from usoflow.errors import UsoflowError, some
from usoflow.models.kinds import (
    IGNORED_ANYWHERE,
    KIND_NAMES,
    OF_DIFFUSERS,
    OTHER_FAMILIES,
    SIGNATURES,
    SINGLE_FILES,
)
from usoflow.models.tensor_header import TensorInfo, read_header

T = TypeVar("T", int, float, tuple[int, ...])

CONFIG_KEY = "usoflow.config"  # safetensors metadata: JSON object, one section per component
SCALE = "scale_weight"  # beside a weight in fp8: what its numbers are multiplied by
_SCALE_TOO = "weight_scale"  # the same, as newer files spell it
_PART = re.compile(r"-\d{5}-of-\d{5}\.")  # in the name of one file of a model that Hugging Face has split


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
        # Of those that have no prefix, what begins as the tensor by which they are told.
        others = (p or OTHER_FAMILIES[kind][0].partition(".")[0] + "." for kind, p in self._others.items())
        prefixes = (*found.values(), *others)
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


def _fingerprint(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UsoflowError("model_missing", f"{path} cannot be read: {error.strerror}.") from None
    return (str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _open_cached(path: Path, fingerprint: tuple[str, int, int]) -> TensorFile:
    tensors, metadata = read_header(path, fingerprint[1])
    return TensorFile(path, MappingProxyType(tensors), MappingProxyType(metadata), fingerprint)

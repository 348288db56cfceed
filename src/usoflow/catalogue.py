"""The model files of the USO tutorial: where each comes from, how large it is, under which licence.

Answers "this file is missing" with a remedy: the folder, the link, and the local file that holds the same
kind of model under another name. Source: https://docs.comfy.org/tutorials/flux/flux-1-uso.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Final

from usoflow.errors import UsoflowError, some
from usoflow.file_names import inside
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux_config import runs
from usoflow.settings import POCKET_MODELS, Folders

_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file that the official workflows name.

    Attributes:
        folder: kind of model folder.
        name: the file name that the workflows use.
        url: where to get it.
        size: for a reader; "≈" where it was derived from the architecture.
        licence: for a reader.
        holds: kinds of component (`kinds.SIGNATURES`) that a file in its place must hold.
    """

    folder: str
    name: str
    url: str
    size: str
    licence: str
    holds: frozenset[str]


KNOWN_FILES: tuple[KnownFile, ...] = (
    KnownFile(
        "checkpoints",
        "flux1-dev-fp8.safetensors",
        f"{_HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev-fp8.safetensors",
        "17.2 GB",
        "FLUX.1 [dev] non-commercial licence",
        frozenset({"flux", "clip_l", "t5", "vae"}),
    ),
    KnownFile(
        "loras",
        "uso-flux1-dit-lora-v1.safetensors",
        f"{_HUB}/Comfy-Org/USO_1.0_Repackaged/resolve/main/split_files/loras/uso-flux1-dit-lora-v1.safetensors",
        "≈ 478 MB at rank 128 in bf16, derived from its shapes",
        "Apache-2.0; the terms of FLUX.1 [dev] apply with it",
        frozenset({"uso_lora"}),
    ),
    KnownFile(
        "model_patches",
        "uso-flux1-projector-v1.safetensors",
        f"{_HUB}/Comfy-Org/USO_1.0_Repackaged/resolve/main/split_files/model_patches/uso-flux1-projector-v1.safetensors",
        "≈ 22 MB in bf16, derived from its shapes",
        "Apache-2.0; the terms of FLUX.1 [dev] apply with it",
        frozenset({"uso_projector"}),
    ),
    KnownFile(
        "clip_vision",
        "sigclip_vision_patch14_384.safetensors",
        f"{_HUB}/Comfy-Org/sigclip_vision_384/resolve/main/sigclip_vision_patch14_384.safetensors",
        "≈ 857 MB in fp16, derived from its shapes",
        "Apache-2.0",
        frozenset({"siglip"}),
    ),
)

CHECKPOINT: Final = KNOWN_FILES[0]  # all of FLUX.1 in one file

PULLS: Final = "usoflow models pull"
OFFERED: Final = 12  # names in an error

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

# Transformers like FLUX.1 [dev] that USO was not made for: taken where there is no other.
OTHER_VARIANTS: Final = ("kontext", "krea", "schnell")

# ByteDance's LoRA of UNO, the forerunner, has the layout of USO's (whose rank is 128), and the same name.
UNO_RANK: Final = 512

# ByteDance's own names (bytedance-research/USO, uso_flux_v1.0/), which two steps of the tutorial use.
ALIASES = {
    ("loras", "dit_lora.safetensors"): "uso-flux1-dit-lora-v1.safetensors",
    ("model_patches", "projector.safetensors"): "uso-flux1-projector-v1.safetensors",
}


@dataclass(frozen=True, slots=True)
class SplitFiles:
    """The files of black-forest-labs and comfyanonymous that hold together what the checkpoint holds.

    Attributes:
        transformer: in the folder diffusion_models.
        clip_l, t5: in text_encoders.
        vae: in vae.
    """

    transformer: str
    clip_l: str
    t5: str
    vae: str


# Folder and kind of component of each, and which names are taken where there are several of the kind.
_SPLIT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("diffusion_models", "flux", ("flux1-dev.safetensors", "flux1-dev-fp8.safetensors")),
    ("text_encoders", "clip_l", ("clip_l.safetensors",)),
    (
        "text_encoders",
        "t5",
        ("t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors", "t5xxl_fp16.safetensors"),
    ),
    ("vae", "vae", ("ae.safetensors",)),
)


def missing_file_remedy(folder: str, name: str, folders: Folders) -> str:
    """What to do about a model file that is not offered: which local file would do, else where to get it."""
    wanted = known_file(folder, name)
    dead = _dead_links(folder, name, folders)
    lines = [f"{link} is a link to {target}, which is not there." for link, target in dead]
    if PurePosixPath(name).suffix in PICKLE_SUFFIXES:
        lines.append(f"{name} is a pickle, which can execute code when it is loaded: it is refused.")
    if twins := list(same_kind(wanted, folders)) if wanted else []:
        named = [f"{twin}{_origin(folder, twin, folders)}" for twin in twins[:OFFERED]]
        names = " or ".join([*named, *([f"{len(twins) - OFFERED} more"] if len(twins) > OFFERED else [])])
        lines.append(
            f"You have {names} in {folder}, which holds the same kind of model: use that name instead."
        )
    if wanted is CHECKPOINT and (split := split_files(folders)):
        parts = f"{split.transformer}, {split.clip_l}, {split.t5} and {split.vae}"
        lines.append(
            f"You have {parts}, which hold the same: load them with UNETLoader, DualCLIPLoader and VAELoader"
            " instead, as `usoflow generate` does."
        )
    place = folders.models[folder][0] if folders.models.get(folder) else folder
    base = PurePosixPath(name).name
    if wanted:
        download = "Or download" if lines else "Download"
        lines.append(f"{download} {wanted.url} ({wanted.size}; {wanted.licence}) into {place}.")
        if wanted in missing(folders):
            lines.append(f"`{pull_command(folders)}` downloads all of the tutorial's files that are missing.")
    elif available := folders.list(folder):
        lines.append(f"There are: {_offered(base, available)}. Choose one, or put {base} into {place}.")
    else:
        lines.append(f"Put {base} into {place}, or name your models folder with --models.")
    return "\n".join(lines)


def _dead_links(folder: str, name: str, folders: Folders) -> Iterator[tuple[Path, str]]:
    """Links by this name in a model folder that lead nowhere, as to a disk that is not mounted."""
    with suppress(UsoflowError, OSError):
        relative = inside(name)
        for link in dict.fromkeys(root / relative for root in folders.models.get(folder, ())):
            if os.path.islink(link) and not os.path.exists(link):
                yield link, os.readlink(link)


def _offered(wanted: str, available: Sequence[str]) -> str:
    """Some names, the most alike first."""
    near = [name for name in available if PurePosixPath(name).name == wanted]
    near += get_close_matches(wanted, available, n=OFFERED)
    return some(dict.fromkeys([*near, *available]), OFFERED)


def _origin(folder: str, name: str, folders: Folders) -> str:
    ours = folders.model(folder, name).is_relative_to(POCKET_MODELS)
    return " (usoflow's own small one, for pictures of 128x128)" if ours else ""


def pull_command(folders: Folders) -> str:
    """What gets the tutorial's files to where these folders find them."""
    return f"{PULLS} --models {quoted(str(folders.named))}" if folders.named else PULLS


def quoted(argument: str) -> str:
    """As the system's shell takes it."""
    return subprocess.list2cmdline([argument]) if os.name == "nt" else shlex.quote(argument)


def known_file(folder: str, name: str) -> KnownFile | None:
    """The tutorial's file of this name, or of ByteDance's name for it."""
    base = name.rpartition("/")[2]
    base = ALIASES.get((folder, base), base)
    return next((file for file in KNOWN_FILES if (file.folder, file.name) == (folder, base)), None)


def same_kind(wanted: KnownFile, folders: Folders) -> Iterator[str]:
    """Files of the same folder that hold what a file of the tutorial holds, in order."""
    return (name for name in folders.list(wanted.folder) if _holds(wanted, name, folders))


def name_of(file: KnownFile, folders: Folders) -> str | None:
    """Under which name a file of the tutorial is there: its own, in a subfolder, or ByteDance's.

    None if it is not, or not as it must be: damaged, or something else.
    """
    names = [name for name in folders.list(file.folder) if known_file(file.folder, name) == file]
    names = [name for name in names if not _is_of_uno(file, name, folders)]
    names.sort(key=lambda name: name != file.name)  # its own first
    return next((name for name in names if _holds(file, name, folders)), None)


def split_files(folders: Folders) -> SplitFiles | None:
    """What can take the checkpoint's place; None where a part is lacking."""
    found = [_one_of(folder, kind, usual, folders) for folder, kind, usual in _SPLIT]
    names = [name for name in found if name is not None]
    return SplitFiles(*names) if len(names) == len(found) else None


def missing(folders: Folders) -> list[KnownFile]:
    """The tutorial's files for which there is nothing that holds exactly the same."""
    lacking = [file for file in KNOWN_FILES if name_of(file, folders) is None]
    return [file for file in lacking if not (file is CHECKPOINT and split_files(folders))]


def _one_of(folder: str, kind: str, usual: tuple[str, ...], folders: Folders) -> str | None:
    """The file of a kind: the first of the usual names, else the largest, which is the most precise."""
    offered = [name for name in folders.list(folder) if _can_be_taken(folder, name, kind, folders)]
    named = {PurePosixPath(name).name: name for name in reversed(offered)}
    chosen = next((named[name] for name in usual if name in named), None)
    return chosen or max(offered, key=lambda name: _rank(folder, name, folders), default=None)


def _can_be_taken(folder: str, name: str, kind: str, folders: Folders) -> bool:
    """Whether a file holds a kind; of transformers, one that can be run."""
    found = _components(folder, name, folders).get(kind)
    return found is not None and (kind != "flux" or runs(found))


def _rank(folder: str, name: str, folders: Folders) -> tuple[bool, int]:
    other = any(word in PurePosixPath(name).name.lower() for word in OTHER_VARIANTS)
    return not other, TensorFile.open(folders.model(folder, name)).bytes


def _holds(wanted: KnownFile, name: str, folders: Folders) -> bool:
    return wanted.holds <= set(_components(wanted.folder, name, folders))


def _is_of_uno(file: KnownFile, name: str, folders: Folders) -> bool:
    """Whether a LoRA by ByteDance's name is UNO's."""
    if "uso_lora" not in file.holds or PurePosixPath(name).name == file.name:
        return False
    try:
        lora = TensorFile.open(folders.model(file.folder, name)).component("uso_lora")
    except UsoflowError:
        return False  # whoever asks what it holds will find that out
    down = next((info.shape for name, info in lora.tensors.items() if name.endswith(".down.weight")), ())
    return down[:1] == (UNO_RANK,)


def _components(folder: str, name: str, folders: Folders) -> Mapping[str, Component]:
    """Components of a file by kind; none of one that cannot be read."""
    try:
        return TensorFile.open(folders.model(folder, name)).components()
    except UsoflowError:
        return {}

"""The model files of the USO tutorial: where each comes from, how large it is, under which licence.

Answers "this file is missing" with a remedy: the folder, the link, and the local file that holds the same
kind of model under another name. Source: https://docs.comfy.org/tutorials/flux/flux-1-uso.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.settings import Folders, own_models

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
        holds: kinds of component (`checkpoint.SIGNATURES`) that a file in its place must hold.
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

PULLS: Final = "usoflow models pull"

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

# ByteDance's own names (bytedance-research/USO, uso_flux_v1.0/), which two steps of the tutorial use.
ALIASES = {
    ("loras", "dit_lora.safetensors"): "uso-flux1-dit-lora-v1.safetensors",
    ("model_patches", "projector.safetensors"): "uso-flux1-projector-v1.safetensors",
}


def missing_file_remedy(folder: str, name: str, folders: Folders) -> str:
    """What to do about a model file that is not offered: which local file would do, else where to get it."""
    wanted = known_file(folder, name)
    lines = []
    if PurePosixPath(name).suffix in PICKLE_SUFFIXES:
        lines.append(f"{name} is a pickle, which can execute code when it is loaded: it is refused.")
    if twins := list(same_kind(wanted, folders)) if wanted else []:
        names = " or ".join(twins)
        lines.append(
            f"You have {names} in {folder}, which holds the same kind of model: use that name instead."
        )
    place = folders.models[folder][0] if folders.models.get(folder) else folder
    if wanted:
        lines.append(f"Download {wanted.url} ({wanted.size}; {wanted.licence}) into {place}.")
        lines.append(f"`{pull_command(folders)}` downloads all of the tutorial's files that are missing.")
    elif available := folders.list(folder):
        lines.append(f"There are: {', '.join(available)}. Choose one, or put {name} into {place}.")
    else:
        lines.append(f"Put {name} into {place}, or name your models folder with --models.")
    return "\n".join(lines)


def pull_command(folders: Folders) -> str:
    """What gets the tutorial's files into the first of the models folders."""
    root = folders.models["checkpoints"][0].parent
    return PULLS if root == own_models() else f"{PULLS} --models {shlex.quote(str(root))}"


def known_file(folder: str, name: str) -> KnownFile | None:
    """The tutorial's file of this name, or of ByteDance's name for it."""
    base = name.rpartition("/")[2]
    base = ALIASES.get((folder, base), base)
    return next((file for file in KNOWN_FILES if (file.folder, file.name) == (folder, base)), None)


def same_kind(wanted: KnownFile, folders: Folders) -> Iterator[str]:
    """Files of the same folder that hold what a file of the tutorial holds, in order."""
    return (name for name in folders.list(wanted.folder) if _holds(wanted, name, folders))


def missing(folders: Folders) -> list[KnownFile]:
    """The tutorial's files that are not there, or not as they must be: damaged, or something else."""
    return [file for file in KNOWN_FILES if not _holds(file, file.name, folders)]


def _holds(wanted: KnownFile, name: str, folders: Folders) -> bool:
    try:
        return wanted.holds <= set(TensorFile.open(folders.model(wanted.folder, name)).components())
    except UsoflowError:
        return False

"""Where things are and what computes: model folders, input and output folders, amounts of memory.

Sources, the first that speaks wins: command-line options, `USOFLOW_*` variables, defaults. ComfyUI's folders
and its `extra_model_paths.yaml` are understood (https://docs.comfy.org/development/core-concepts/models).

What is there `os.path` is asked: where nobody may look it finds nothing, and `pathlib` raises an error.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs
import yaml

from usoflow.errors import UsoflowError
from usoflow.file_names import can_be_told, inside

logger = logging.getLogger(__name__)

# ComfyUI's name of each kind of model folder, and the directory names under a models folder that hold it
# (the tutorial says `clip_visions`, ComfyUI itself `clip_vision`; `unet` and `clip` are the older names).
MODEL_FOLDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "checkpoints": ("checkpoints",),
        "diffusion_models": ("diffusion_models", "unet"),
        "text_encoders": ("text_encoders", "clip"),
        "vae": ("vae",),
        "loras": ("loras",),
        "model_patches": ("model_patches",),
        "clip_vision": ("clip_vision", "clip_visions"),
    }
)
DRAWING = ("checkpoints", "diffusion_models")  # the kinds without one of which nothing is drawn
MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf")
IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".avif",
)  # fmt: skip
EXTRA_PATHS_FILE = "extra_model_paths.yaml"

POCKET_MODELS = Path(__file__).parent / "pocket" / "models"  # small ones that ship with the package

_UNITS: Mapping[str, int] = MappingProxyType({"K": 1, "M": 2, "G": 3, "T": 4})

MODELS_VARIABLE = "USOFLOW_MODELS"
INPUT_VARIABLE = "USOFLOW_INPUT"
OUTPUT_VARIABLE = "USOFLOW_OUTPUT"


@dataclass(frozen=True)
class Folders:
    """Every place that a run reads from or writes to.

    Attributes:
        models: directories by kind of model folder (keys of `MODEL_FOLDERS`), searched in order.
        inputs: directories in which `LoadImage` finds its pictures, searched in order.
        output: where `SaveImage` writes.
        temp: where `PreviewImage` writes.
        given_images: pictures named on the command line, by the name that the prompt uses for them.
        named: the models folder as an option, and no variable, has named it.
    """

    models: Mapping[str, tuple[Path, ...]]
    inputs: tuple[Path, ...]
    output: Path
    temp: Path
    given_images: Mapping[str, Path] = field(default_factory=dict)
    named: Path | None = None

    def list(self, folder: str) -> Sequence[str]:
        """Names that a combo offers: model files of a kind, or the pictures of the folder "input".

        Names are relative to their folder with forward slashes, sorted, each once.
        """
        if folder == "input":
            found = {n for root in self.inputs for n in _names(root, IMAGE_SUFFIXES, deep=False)}
            return sorted(found | set(self.given_images))
        return sorted({n for root in self.models.get(folder, ()) for n in _names(root, MODEL_SUFFIXES)})

    def are_pocket(self, folder: str) -> bool:
        """Whether models of a kind are the small ones that ship with the package."""
        return self.models[folder][-1].is_relative_to(POCKET_MODELS)

    def exists(self, folder: str, name: str) -> bool:
        """Whether "input", "output" or "temp" holds this picture; False for names that leave the folder."""
        try:
            return self._picture(folder, name) is not None
        except UsoflowError:
            return False

    def model(self, folder: str, name: str) -> Path:
        """The file that a loader's combo value names.

        Raises:
            UsoflowError: `model_missing`, `path_outside`.
        """
        path = _find(self.models.get(folder, ()), name)
        if path is None:
            looked = ", ".join(str(root) for root in self.models.get(folder, ())) or "no folder at all"
            raise UsoflowError("model_missing", f"{name} is not in {folder} (looked in {looked}).")
        return path

    def picture(self, folder: str, name: str) -> Path:
        """The picture that a `LoadImage` names, in the folder "input", "output" or "temp".

        Raises:
            UsoflowError: `image_missing`, `path_outside`.
        """
        path = self._picture(folder, name)
        if path is None:
            looked = ", ".join(str(root) for root in self.picture_roots(folder))
            raise UsoflowError("image_missing", f"The picture {name} was not found (looked in {looked}).")
        return path

    def _picture(self, folder: str, name: str) -> Path | None:
        given = self.given_images.get(name) if folder == "input" else None
        return given or _find(self.picture_roots(folder), name)

    def picture_roots(self, folder: str) -> tuple[Path, ...]:
        """Where the pictures of "input", "output" or "temp" are; nowhere, for any other name."""
        return {"input": self.inputs, "output": (self.output,), "temp": (self.temp,)}.get(folder, ())


def find_folders(
    *,
    models: Path | None = None,
    inputs: Path | None = None,
    beside: Path | None = None,
    output: Path | None = None,
    given_images: Mapping[str, Path] | None = None,
) -> Folders:
    """The folders of a run, from options, `USOFLOW_*` variables and defaults.

    Args:
        models: a ComfyUI folder or its `models` folder; default `USOFLOW_MODELS` (several may be given, as
            in PATH), else the user's data directory and, while that holds none that draws, `POCKET_MODELS`.
        inputs: where pictures are; default `USOFLOW_INPUT`, else `input` here and in ComfyUI folders, those
            that are there first.
        beside: the workflow file, whose own folder is searched last where `inputs` is not given.
        output: default `USOFLOW_OUTPUT`, else `output` here.
        given_images: see `Folders`.

    Raises:
        UsoflowError: `file_not_found` for a folder of models or inputs that is not there, `settings_invalid`.
    """
    models, inputs = (folder and expanded(folder) for folder in (models, inputs))
    roots = [models] if models else _from_variable(MODELS_VARIABLE)
    named_inputs = [inputs] if inputs else _from_variable(INPUT_VARIABLE)
    for what, folders in (("models", roots), ("input", named_inputs)):
        for folder in folders:
            _check_folder(folder, what)
    if models:
        _check_level(models)
    roots = roots or _default_models()
    default_inputs = [Path("input"), *(r / "input" for r in roots), *(r.parent / "input" for r in roots)]
    default_inputs.sort(key=lambda folder: not os.path.isdir(folder))  # uploads go into the first
    default_inputs += [beside.parent] if beside else []
    return Folders(
        models=_model_directories(roots),
        inputs=tuple(named_inputs or default_inputs),
        output=expanded(output or Path(os.environ.get(OUTPUT_VARIABLE) or "output")),
        temp=temp_folder(),
        given_images=given_images or {},
        named=models,
    )


def expanded(path: str | Path) -> Path:
    """The path with a home folder for `~` or `~NAME`; as it is where nobody has that name: a file may."""
    return Path(os.path.expanduser(path))


def _check_folder(folder: Path, what: str) -> None:
    if not os.path.isdir(folder):
        reason = "is not a folder" if os.path.exists(folder) else "does not exist or cannot be read"
        raise UsoflowError("file_not_found", f"The {what} folder {folder} {reason}.")


def _check_level(folder: Path) -> None:
    """Refuse what lies next to the models folder: all files would seem to be missing."""
    kinds = {name for names in MODEL_FOLDERS.values() for name in names}
    home = folder / "models" if os.path.isdir(folder / "models") else folder
    if any(os.path.isdir(home / name) for name in kinds) or os.path.isfile(folder / EXTRA_PATHS_FILE):
        return
    if os.path.isfile(folder / "model_index.json"):
        what, better = "is in diffusers' layout, which is not read", "a folder of single files"
    elif os.path.isdir(folder / "ComfyUI" / "models"):
        what, better = "is no models folder", str(folder / "ComfyUI")
    elif folder.absolute().name in kinds:
        what, better = "is one kind of models", str(folder.absolute().parent)
    else:
        return
    raise UsoflowError("settings_invalid", f"{folder} {what}.", remedy=f"Name {better} with --models.")


def existing_part(folder: Path) -> Path | None:
    """The folder, or the nearest above it that is there; None on a drive or a share that is not.

    A link to nothing is there, and so is a name that is too long: no folder can be made in its place.
    """
    for path in (folder.absolute(), *folder.absolute().parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except OSError:
            pass
        return path
    return None


def check_writable(folder: Path, named_by: str = "--output or USOFLOW_OUTPUT") -> None:
    """Before minutes are spent on what could not be kept there.

    Args:
        folder: may yet have to be made.
        named_by: what another one is chosen with.

    Raises:
        UsoflowError: `output_unwritable`.
    """
    there = existing_part(folder)
    if there is None or not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        raise UsoflowError(
            "output_unwritable",
            f"{folder} is not a folder that can be written to.",
            remedy=f"Make it one, or choose another with {named_by}.",
        )


def temp_folder() -> Path:
    """Where `PreviewImage` writes."""
    return platformdirs.user_cache_path("usoflow") / "temp"


def compiled_folder() -> Path:
    """Where a compiler keeps what it made."""
    return platformdirs.user_cache_path("usoflow") / "compiled"


def own_models() -> Path:
    """The models folder in the user's data directory."""
    return platformdirs.user_data_path("usoflow") / "models"


def _default_models() -> list[Path]:
    """The user's own; the small ones too as long as none of the user's draws, whatever else is there."""
    own = own_models()
    folders = _model_directories([own])
    drawing = (folder for kind in DRAWING for folder in folders[kind])
    return [own] if any(any(_names(folder, MODEL_SUFFIXES)) for folder in drawing) else [own, POCKET_MODELS]


def named_models() -> Path | None:
    """The first models folder that the variable names: downloads go there."""
    return next(iter(_from_variable(MODELS_VARIABLE)), None)


def _from_variable(name: str) -> list[Path]:
    return [expanded(part) for part in os.environ.get(name, "").split(os.pathsep) if part]


def _model_directories(roots: Sequence[Path]) -> Mapping[str, tuple[Path, ...]]:
    found: dict[str, list[Path]] = {kind: [] for kind in MODEL_FOLDERS}
    for root in roots:
        base = root / "models" if os.path.isdir(root / "models") else root
        for kind, names in MODEL_FOLDERS.items():
            found[kind] += [base / name for name in names]
        for place in (root, root.parent):
            for kind, paths, first in _extra_paths(place / EXTRA_PATHS_FILE):
                found[kind] = [*paths, *found[kind]] if first else [*found[kind], *paths]
    return {kind: tuple(dict.fromkeys(paths)) for kind, paths in found.items()}


def _extra_paths(file: Path) -> Iterator[tuple[str, list[Path], bool]]:
    """Directories by kind from ComfyUI's file: sections of `kind: paths`, a path a line under `base_path`.

    And whether they come before the others, where downloads go too: `is_default`.
    """
    if not os.path.isfile(file):
        return
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsoflowError("settings_invalid", f"{file} cannot be read: {error}") from None
    for title, section in _entries(sections, str(file)).items():
        where = f"{file}, {title}"
        entries = _entries(section, where)
        base = expanded(os.path.expandvars(_text(entries, "base_path", where) or file.parent))
        base = base if base.is_absolute() else file.parent / base
        for kind, names in MODEL_FOLDERS.items():
            for key in names:
                lines = _text(entries, key, where).split("\n")
                paths = [base / line.strip() for line in lines if line.strip()]
                yield kind, paths, entries.get("is_default") is True


def _entries(value: object, where: str) -> Mapping[Any, Any]:
    """The file's sections, or the lines of one; where all lines are comments it is None."""
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise UsoflowError("settings_invalid", f"{where}: {value!r} stands where lines of `name: ...` must.")


def _text(entries: Mapping[Any, Any], key: str, where: str) -> str:
    value = entries.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    what = f"{where}, {key}: {value!r} is no path."
    raise UsoflowError(
        "settings_invalid", what, remedy="Write a path there; several go below each other, after `|`."
    )


def _names(root: Path, suffixes: tuple[str, ...], *, deep: bool = True) -> Iterator[str]:
    """Files by suffix; a folder that cannot be read offers nothing, one that is a link is followed once."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, onerror=_tell, followlinks=True):
        if not deep or os.path.realpath(folder) in seen:
            subfolders.clear()
        seen.add(os.path.realpath(folder))
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and os.path.isfile(path):
                found = path.relative_to(root).as_posix()
                if can_be_told(found):
                    yield found
                else:
                    _warn_of_name(root, found)


def _tell(error: OSError) -> None:
    """Why a folder offers nothing, unless it is not there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        _warn_of_folder(error.filename, error.strerror)


@functools.cache  # once for each folder
def _warn_of_folder(folder: str, reason: str) -> None:
    logger.warning("%s cannot be read, so nothing in it is offered: %s.", folder, reason)


@functools.cache  # once for each file
def _warn_of_name(root: Path, name: str) -> None:
    logger.warning("%r in %s is not offered: its name is not UTF-8 or has a \\. Rename it.", name, root)


def _find(roots: Sequence[Path], name: str) -> Path | None:
    """The first file of this name; names that leave their folder are refused before the disk is asked."""
    relative = inside(name)
    return next((root / relative for root in roots if os.path.isfile(root / relative)), None)


def bytes_of(text: str) -> int:
    """Bytes of "8GB", "512 MB", "6.5G": decimal units, as memory is sold; "8GiB" is 8 * 1024**3.

    A bare number has no unit.

    Raises:
        UsoflowError: `budget_invalid`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(?:(i?)B)?\s*", text, re.IGNORECASE)
    amount = float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()] if match else 0.0
    if not 1 <= amount < math.inf:
        raise UsoflowError("budget_invalid", f"{text!r} is not an amount of memory.")
    return int(amount)


def size_in_words(count: int) -> str:
    """'17.2 GB', '478 MB', '3 kB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"

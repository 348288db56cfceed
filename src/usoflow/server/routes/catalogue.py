"""`/object_info`, `/models`, `/embeddings`: which nodes and model files there are, at this moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter

from usoflow.errors import UsoflowError
from usoflow.schema.object_info import render, render_all
from usoflow.server.context import Json, Server, ServerOf
from usoflow.settings import MODEL_FOLDERS

router = APIRouter(tags=["nodes and models"])

KINDS: Final = {name: kind for kind, names in MODEL_FOLDERS.items() for name in names}  # older names, too
# Folders of ComfyUI that public pages name besides, and nothing here loads.
OTHER_KINDS: Final = (
    "configs", "controlnet", "diffusers", "embeddings", "gligen", "hypernetworks", "photomaker",
    "style_models", "upscale_models", "vae_approx",
)  # fmt: skip


@router.get("/object_info")
def object_info(server: ServerOf) -> Json:
    """Every node type."""
    return render_all(server.registry, server.folders)


@router.get("/object_info/{class_type}")
def object_info_of(server: ServerOf, class_type: str) -> Json:
    """One node type; empty if there is none of this name."""
    schema = server.registry.schema(class_type)
    return {class_type: render(schema, server.folders)} if schema else {}


@router.get("/models")
def model_folders(server: ServerOf) -> list[str]:
    """The kinds of model folders."""
    return list(server.folders.models)


@router.get("/models/{folder}")
def models(server: ServerOf, folder: str) -> list[str]:
    """The files of a kind."""
    return _listed(server, folder)


@router.get("/embeddings")
def embeddings() -> list[str]:
    """usoflow has none."""
    return []


@router.get("/experiment/models")
def model_places(server: ServerOf) -> list[Json]:
    """Where each kind of model is."""
    return [{"name": kind, "folders": paths} for kind, paths in folder_paths(server).items()]


@router.get("/experiment/models/{folder}")
def model_files(server: ServerOf, folder: str) -> list[Json]:
    """The files of a kind with size and times."""
    found = (_file(server, KINDS[folder], name) for name in _listed(server, folder))
    return [record for record in found if record]


@router.get("/internal/folder_paths")
def folder_paths(server: ServerOf) -> dict[str, list[str]]:
    """The same as an object."""
    return {kind: [_shown(path) for path in paths] for kind, paths in server.folders.models.items()}


def _shown(path: Path) -> str:
    """A path as text; not every one is."""
    return os.fsencode(path).decode(errors="replace")


def _listed(server: Server, folder: str) -> list[str]:
    if folder in OTHER_KINDS:
        return []
    if folder not in KINDS:
        what = f"There is no model folder {folder}."
        raise UsoflowError("file_not_found", what, remedy="/models lists the folders.")
    return list(server.folders.list(KINDS[folder]))


def _file(server: Server, folder: str, name: str) -> dict[str, Any] | None:
    try:
        path = server.folders.model(folder, name)
        state = path.stat()
    except (UsoflowError, OSError):  # gone since it was listed
        return None
    index = _root_index(server.folders.models[folder], path)
    times = {"modified": state.st_mtime, "created": state.st_ctime}
    return {"name": name, "pathIndex": index, **times, "size": state.st_size}


def _root_index(roots: tuple[Path, ...], path: Path) -> int:
    return next((number for number, root in enumerate(roots) if path.is_relative_to(root)), 0)

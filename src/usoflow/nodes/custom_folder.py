"""Custom nodes of a folder, as ComfyUI's `custom_nodes`: a file or a package each, with NODE_CLASS_MAPPINGS.

Their code runs when they are loaded, with all that the process may do: the folder is the user's, named on the
command line; a workflow never names one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from usoflow.errors import UsoflowError
from usoflow.nodes.custom import UnusableNodeError, adapt
from usoflow.schema.node import AnyNode, NodeRegistry
from usoflow.settings import expanded

logger = logging.getLogger(__name__)

PREFIX: Final = "usoflow_custom_nodes"  # so that a file named like a library does not hide it
COMFYUI_MODULES: Final = frozenset(
    {
        "app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version", "cuda_malloc",
        "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "protocol", "server", "utils",
    }
)  # fmt: skip


@dataclass(frozen=True)
class CustomNodes:
    """What a folder gave: nodes, and one line for each file or class that cannot be used."""

    nodes: tuple[AnyNode, ...] = ()
    problems: tuple[str, ...] = ()


def check_folder(folder: Path) -> Path:
    """The folder, `~` expanded. Raises UsoflowError `file_not_found` if it cannot be read."""
    folder = expanded(folder)
    if not (os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)):
        what = f"The folder of custom nodes {folder} does not exist or cannot be read."
        raise UsoflowError("file_not_found", what)
    return folder


def with_custom(own: NodeRegistry, folder: Path | None) -> NodeRegistry:
    """The registry with the nodes of a folder added; what cannot be used is logged."""
    if folder is None:
        return own
    found = load(check_folder(folder), own)
    for problem in found.problems:
        logger.warning("custom nodes: %s", problem)
    return NodeRegistry([*own.values(), *found.nodes])


def load(folder: Path, taken: Collection[str]) -> CustomNodes:
    """Load everything in a folder; what fails is told and does not keep the rest from being loaded.

    Args:
        taken: names of node types that no file may replace.
    """
    nodes: dict[str, AnyNode] = {}
    problems: list[str] = []
    for path in _candidates(folder):
        try:
            defined = list(_nodes(_module(path), path.stem))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit: a file may do whatever it likes
            problems.append(f"{path.name}: {_reason(error)}")
            continue
        for name, found in defined:
            if isinstance(found, str):
                problems.append(f"{path.name}: {name}: {found}")
            elif name in taken or name in nodes:
                problems.append(f"{path.name}: {name}: there is a node of this name already")
            else:
                nodes[name] = found
    return CustomNodes(tuple(nodes.values()), tuple(problems))


def _candidates(folder: Path) -> Iterator[Path]:
    """Python files and packages by name; as in ComfyUI, those that end in `.disabled` are left out."""
    for path in sorted(folder.iterdir()):
        left_out = path.name.startswith((".", "_")) or path.suffix == ".disabled"
        if not left_out and (path.suffix == ".py" or os.path.isfile(path / "__init__.py")):
            yield path


def _module(path: Path) -> ModuleType:
    package = path / "__init__.py" if os.path.isdir(path) else path
    name = f"{PREFIX}.{path.stem}"
    places = [str(path)] if os.path.isdir(path) else None
    spec = importlib.util.spec_from_file_location(name, package, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for relative imports, dataclasses and pickles of its own
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _nodes(module: ModuleType, stem: str) -> Iterator[tuple[str, AnyNode | str]]:
    """Each class by name: its node, or why it is none."""
    classes = getattr(module, "NODE_CLASS_MAPPINGS", None)
    if not isinstance(classes, dict):
        yield "NODE_CLASS_MAPPINGS", "the file has none, so it defines no nodes"
        return
    labels = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None)
    labels = labels if isinstance(labels, dict) else {}
    for name, cls in classes.items():
        try:
            yield str(name), adapt(str(name), cls, module=stem, display_name=labels.get(name))
        except UnusableNodeError as error:
            yield str(name), str(error)


def _reason(error: BaseException) -> str:
    """Why a file was not loaded, in words that say what to do."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return f"{type(error).__name__}: {error}"
    package = error.name.partition(".")[0]
    if package in COMFYUI_MODULES:
        return f"it needs ComfyUI's own module {error.name!r}, which usoflow does not have"
    if package == PREFIX:
        return f"one of its own files is missing: {error.name.removeprefix(PREFIX + '.')}"
    # No name of a package is advised: a stranger's may be called as the module is.
    return f"it needs the module {error.name!r}, which is not installed: see its requirements.txt"

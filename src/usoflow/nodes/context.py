"""What the executor lends a node while it runs: folders, models, progress, and the prompt being run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from usoflow.settings import Folders

if TYPE_CHECKING:
    from usoflow.models.library import ModelLibrary


@dataclass(frozen=True)
class NodeContext:
    """Lent to nodes that declare a keyword-only `context`.

    Attributes:
        folders: where files are read and written.
        library: the models, loaded once.
        report: `report(step, steps)` tells progress; raises `UsoflowError("cancelled")` to stop the run.
        prompt: the whole prompt, to be written into pictures.
        workflow: the UI graph it came from, if any, likewise.
    """

    folders: Folders
    library: ModelLibrary
    report: Callable[[int, int], None]
    prompt: Mapping[str, Any]
    workflow: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SavedImage:
    """A picture that an output node wrote: `subfolder` of the folder `type` ("output" or "temp")."""

    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True, slots=True)
class Shown:
    """What an output node has to show: ComfyUI's `ui` record."""

    images: tuple[SavedImage, ...] = ()

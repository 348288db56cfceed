"""What the executor lends a node while it runs: folders, models, progress, and the prompt being run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from usoflow.settings import Folders

if TYPE_CHECKING:
    from torch import Tensor

    from usoflow.models.library import ModelLibrary

PARTIAL_SUFFIX: Final = ".part"  # of a picture that is being written, beside its final name
TAKEN_NAME: Final = re.compile(rf"_\d{{5,}}_{re.escape(PARTIAL_SUFFIX)}$")  # of such a picture
PREVIEW_PREFIX: Final = "preview_"  # of the files that PreviewImage makes
Reserve = Callable[[Path], None]


class Report(Protocol):
    """Tells progress; raises `UsoflowError("cancelled")` to stop the run."""

    def __call__(self, step: int, steps: int, latent: Tensor | None = None, png: bytes = b"", /) -> None:
        """`step` of `steps` are done; `latent` [B, C, H, W] is the estimate of the result.

        `png` is a whole picture, sent to whoever asked for the run.
        """


def unreserved(path: Path) -> None:
    """Where nobody keeps a list of what is written."""


@dataclass(frozen=True)
class NodeContext:
    """Lent to nodes that declare a keyword-only `context`.

    Attributes:
        folders: where files are read and written.
        library: the models, loaded once.
        report: tells progress.
        prompt: the whole prompt, to be written into pictures.
        workflow: the UI graph it came from, if any, likewise.
        node: the id of the node that is run.
        instances: of custom nodes, which keep theirs from run to run, by id and type of the node.
        reserve: is told the final path of each picture before anything is written.
    """

    folders: Folders
    library: ModelLibrary
    report: Report
    prompt: Mapping[str, Any]
    workflow: Mapping[str, Any] | None = None
    node: str = ""
    instances: MutableMapping[tuple[str, str], Any] = field(default_factory=dict)
    reserve: Reserve = unreserved


@dataclass(frozen=True, slots=True)
class SavedImage:
    """A picture that an output node wrote: `subfolder` of the folder `type` ("output" or "temp")."""

    filename: str
    subfolder: str
    type: str

    @classmethod
    def of(cls, image: Any) -> Self | None:
        """What an entry of `ui`'s images names; None for one that is no file: custom nodes list anything."""
        if not (isinstance(image, dict) and isinstance(image.get("filename"), str)):
            return None
        return cls(image["filename"], str(image.get("subfolder") or ""), str(image.get("type") or "output"))

    def path(self, folders: Folders) -> Path | None:
        """Where it is; None for what a custom node shows from elsewhere."""
        root = {"output": folders.output, "temp": folders.temp}.get(self.type)
        return None if root is None else root / self.subfolder / self.filename


@dataclass(frozen=True, slots=True)
class Shown:
    """What an output node has to show: ComfyUI's `ui` record.

    Custom nodes may show `other` things, as JSON, and have `outputs` besides.
    """

    images: tuple[SavedImage, ...] = ()
    other: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Any, ...] = ()

    def paths(self, folders: Folders) -> Iterator[Path]:
        """Where its pictures are, as far as they are in these folders."""
        for image in self.images:
            if path := image.path(folders):
                yield path.absolute()

    def record(self) -> dict[str, Any]:
        """As JSON."""
        images = [asdict(image) for image in self.images]
        return {"images": images, **self.other} if images or not self.other else dict(self.other)

"""What a run gave: its pictures, where they are, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from usoflow.durable import sha256
from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    from PIL.Image import Image

    from usoflow.api.workflow import Workflow
    from usoflow.execution.progress import NodeFinished
    from usoflow.nodes.context import Shown


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        paths: the files that were written, in the order of the output nodes.
        seeds: of the samplers.
        seconds: for the whole run.
        shown: what each output node has to show (`Shown`), by its id.
        nodes: one record for each node that ran: id, type, seconds, peak memory.
        cached: ids of the nodes whose outputs were known from an earlier run.
        warnings: what was odd about the workflow.
        device: where it was computed ("cpu", "cuda", "mps").
        dtype: in which number format ("float32", "bfloat16", ...).
        workflow: what was run. Pictures that were given from memory go with the engine: to run it again
            afterwards they are given again, by `with_picture`.
        checksums: SHA-256 of each of `paths`, as it was written.
    """

    paths: tuple[Path, ...]
    seeds: tuple[int, ...]
    seconds: float
    shown: Mapping[str, Shown] = field(repr=False)
    nodes: Sequence[NodeFinished] = field(repr=False)
    cached: Sequence[str] = field(repr=False)
    warnings: tuple[str, ...]
    device: str
    dtype: str
    workflow: Workflow = field(repr=False)
    checksums: tuple[str, ...] = field(repr=False)

    @cached_property
    def images(self) -> list[Image]:
        """The pictures; `info` of each holds `prompt` and `workflow` as JSON texts.

        They are read when they are first asked for.

        Raises:
            UsoflowError: `image_missing` for a file that was moved or replaced before.
        """
        from PIL import Image

        pictures: list[Image.Image] = []
        for path, checksum in zip(self.paths, self.checksums, strict=True):
            if not path.is_file() or sha256(path) != checksum:
                what = f"{path} is no longer what this run wrote."
                advice = "Ask for `images` before files are moved: names that are free are used again."
                raise UsoflowError("image_missing", what, remedy=advice)
            picture = Image.open(path)
            picture.load()  # all of it, so that the file is closed
            pictures.append(picture)
        return pictures

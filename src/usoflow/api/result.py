"""What a run gave: its pictures, where they are, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

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
    """

    paths: tuple[Path, ...]
    seeds: tuple[int, ...]
    seconds: float
    shown: Mapping[str, Shown]
    nodes: Sequence[NodeFinished]
    cached: Sequence[str]
    warnings: tuple[str, ...]
    device: str
    dtype: str
    workflow: Workflow

    @cached_property
    def images(self) -> list[Image]:
        """The pictures; `info` of each holds `prompt` and `workflow` as JSON texts."""
        from PIL import Image

        pictures: list[Image.Image] = [Image.open(path) for path in self.paths]
        for picture in pictures:
            picture.load()  # all of it, so that the file is closed
        return pictures

"""Jobs as the server knows them: what was asked for, where each is, what it has shown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from usoflow.nodes.context import SavedImage


class State(StrEnum):
    """Where a job is; the last three are final."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


WAITING = (State.PENDING, State.IN_PROGRESS)
FINAL = (State.COMPLETED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asked for; `targets` are the output nodes.

    `number` orders the queue; without one a job is its last, or its first if it is to be at the `front`.
    """

    id: str
    prompt: Mapping[str, Any]
    targets: tuple[str, ...]
    extra: Mapping[str, Any]
    client: str | None = None
    front: bool = False
    number: float | None = None

    @property
    def workflow(self) -> Mapping[str, Any] | None:
        """The UI graph, if the client sent it."""
        info = self.extra.get("extra_pnginfo")
        found = info.get("workflow") if isinstance(info, dict) else None
        return found if isinstance(found, dict) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row without its prompt. Times are milliseconds since 1970.

    Attributes:
        outputs: what each output node has shown, by node id: {"images": [{filename, subfolder, type}]}.
        error: why the job failed or was stopped, as the event `execution_error` tells it.
        workflow: the id in the UI graph.
    """

    id: str
    state: State
    number: float
    client: str | None
    workflow: str | None
    created: int
    started: int | None
    ended: int | None
    cached: Sequence[str]
    outputs: Mapping[str, Any]
    error: Mapping[str, Any] | None

    @property
    def place(self) -> float:
        """`number` as clients are told it: whole where it is that."""
        return int(self.number) if self.number.is_integer() else self.number


def pictures(shown: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The files among the images that a node has shown: custom ones may list anything there."""
    listed = shown.get("images")
    for image in listed if isinstance(listed, list) else ():
        if saved := SavedImage.of(image):
            yield {**image, **asdict(saved)}


def reported(files: Sequence[Path], outputs: Mapping[str, Any]) -> set[Path]:
    """Those of a job's files that it has shown, by name and subfolder of an output folder that may be any.

    Where both x/a.png and x/y/a.png could be the a.png that is shown, it is the former.
    """
    found: set[Path] = set()
    for image in (image for shown in outputs.values() for image in pictures(shown)):
        name = PurePosixPath(image["subfolder"], image["filename"]).parts
        here = [path for path in files if path.parts[-len(name) :] == name]
        roots = {Path(*path.parts[: -len(name)]): path for path in here}
        found |= {path for root, path in roots.items() if roots.keys().isdisjoint(root.parents)}
    return found


def nowhere(job_id: str) -> dict[str, Any]:
    """The event `execution_interrupted` of a job that had not begun, or no longer has anybody who knows."""
    return {"prompt_id": job_id, "node_id": "", "node_type": "", "executed": []}


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)

"""What a run tells while it goes on, and how it is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from usoflow.errors import UsoflowError
from usoflow.nodes.context import Shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class NodesCached:
    """These nodes are not run.

    What they give is known from an earlier run, will be from an equal node of this one, or is not needed.
    `shown` is what output nodes among them showed then, and show again.
    """

    node_ids: tuple[str, ...]
    shown: Mapping[str, Shown]


@dataclass(frozen=True, slots=True)
class NodeStarted:
    """A node begins."""

    node_id: str
    class_type: str


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """A node has done `step` of `steps`.

    Attributes:
        latent: the estimate of its result so far, if it has one.
        png: a picture that it sends instead of saving it, a PNG file; empty if it sends none.
    """

    node_id: str
    step: int
    steps: int
    latent: Tensor | None = field(default=None, compare=False, repr=False)
    png: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class NodeFinished:
    """A node is done.

    Attributes:
        seconds: how long it took.
        peak_bytes: the most memory the process held meanwhile (on the GPU if it computes there).
        shown: what an output node has to show.
    """

    node_id: str
    class_type: str
    seconds: float
    peak_bytes: int
    shown: Shown | None


Event = NodesCached | NodeStarted | NodeProgress | NodeFinished
Listener = Callable[[Event], None]


class Cancellation:
    """Set from any thread or signal handler.

    The run notices within one step, picture or tile, or once one file is read.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()

    def set(self) -> None:
        """Ask the run to stop."""
        self._flag.set()

    def check(self) -> None:
        """Raise `UsoflowError("cancelled")` if the run is to stop."""
        if self._flag.is_set():
            raise UsoflowError("cancelled", "The run was stopped.")

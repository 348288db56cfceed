"""What an engine is to the server, and what server and worker tell each other: one JSON object a line.

`worker.py` is at one end of the pipe, `process.py` at the other. Nothing here needs torch.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol, Self

from usoflow.errors import UsoflowError
from usoflow.schema.specs import NodeSchema

_PICTURES: Final = ("preview", "png")  # of Progress, bytes
HALF: Final = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate, with its other half or without

# --- server to worker --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Run what `targets` need of a valid prompt; `preview` asks for pictures while it is sampled."""

    job: str
    prompt: Mapping[str, Any]
    targets: tuple[str, ...]
    workflow: Mapping[str, Any] | None
    preview: bool = True


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this job, if its `Run` has come and it has not ended; a later job may have the same id."""

    job: str


@dataclass(frozen=True, slots=True)
class Free:
    """Forget models before the next job, and `outputs` too if so asked."""

    outputs: bool


# --- worker to server --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker takes jobs; `system` describes its device as /system_stats does.

    `nodes` are the schemas of custom nodes, which it alone loads, as `schema.wire` writes them.
    """

    system: Mapping[str, Any]
    nodes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """`system` of `Ready` once more: how much memory is free has changed."""

    system: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Begun:
    """The worker has taken the job: should everything end from here on, the job may be the cause."""


@dataclass(frozen=True, slots=True)
class Cached:
    """These nodes are not run; `shown` is what output nodes among them show, as a record of JSON."""

    nodes: tuple[str, ...]
    shown: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    """A node begins."""

    node: str
    class_type: str


@dataclass(frozen=True, slots=True)
class Progress:
    """A node has done `step` of `steps`.

    `preview` is a JPEG of how far it is, or empty; `png` a picture that it sends instead of saving it, or
    empty.
    """

    node: str
    step: int
    steps: int
    preview: bytes = b""
    png: bytes = b""


@dataclass(frozen=True, slots=True)
class Finished:
    """A node is done; `shown` is what an output node has to show, ComfyUI's `ui` record."""

    node: str
    seconds: float
    peak_bytes: int
    shown: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Done:
    """The run is complete."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The run was stopped as asked."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The run failed; `node` and `class_type` say where, if it was in a node."""

    code: str
    detail: str
    remedy: str
    node: str = ""
    class_type: str = ""
    traceback: tuple[str, ...] = field(default=())

    @classmethod
    def by(cls, error: Exception, frames: Sequence[str] = ()) -> Self:
        """By an error outside of nodes; what is none of ours is a defect."""
        if not isinstance(error, UsoflowError):
            error = UsoflowError("node_failed", f"{type(error).__name__}: {error}")
        return cls(error.code, error.detail, error.remedy, traceback=tuple(frames))


Command = Run | Cancel | Free
Report = Begun | Cached | Started | Progress | Finished
Outcome = Done | Cancelled | Failed
Message = Command | Report | Outcome | Ready | Device

_MESSAGES: Mapping[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Run,
        Cancel,
        Free,
        Ready,
        Device,
        Begun,
        Cached,
        Started,
        Progress,
        Finished,
        Done,
        Cancelled,
        Failed,
    )
}


class Engine(Protocol):
    """Runs one job at a time. All methods may be called from any thread, `run` from one at a time."""

    def start(self) -> None:
        """Get ready for the first job."""

    def run(self, run: Run, listen: Callable[[Report], None]) -> Outcome:
        """Run a job to its end. Raises UsoflowError `worker_died` if the process ends before the job."""

    def cancel(self, job: str) -> None:
        """Stop a job if it runs; `run` then returns `Cancelled`."""

    def free(self, *, outputs: bool) -> None:
        """Give the memory of the models back before the next job, and that of outputs that are kept."""

    def system(self) -> Mapping[str, Any]:
        """What is known of the device that computes."""

    def fault(self) -> str:
        """Why no job can be run, and what to do about it; empty as long as none of that is known."""

    def nodes(self) -> Sequence[NodeSchema]:
        """Custom nodes; waits a while for a process that is just starting."""

    def stop(self) -> None:
        """End the process, whatever it is doing."""


def encode(message: Message) -> bytes:
    """One line."""
    record = {"message": type(message).__name__, **asdict(message)}
    if isinstance(message, Progress):
        record |= {name: base64.b64encode(record[name]).decode() for name in _PICTURES}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line. Raises UsoflowError `worker_died` for what is none."""
    try:
        text = line.decode()
        record = whole_characters(json.loads(text), text)
        kind = _MESSAGES[record.pop("message")]
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
        if kind is Progress:
            values |= {name: base64.b64decode(values[name]) for name in _PICTURES}
        return kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsoflowError("worker_died", f"The worker wrote what cannot be read: {error!r}.") from None


def whole_characters(decoded: Any, encoded: str) -> Any:
    """Decoded JSON with U+FFFD for every half of a surrogate pair, which no answer could hold.

    Programs that cut texts leave them, and Python where the name of a file is not UTF-8.
    """
    if not HALF.search(encoded):
        return decoded
    text = json.dumps(decoded, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

"""The worker process: takes `Run` commands on stdin, runs them with the executor, reports on stdout.

Started by `process.WorkerProcess`, once per device. It ends when its stdin does, that is with the server, and
never outlives it: a new server would otherwise find pictures appear under names that it has given away.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from usoflow.errors import UsoflowError
from usoflow.nodes.context import TAKEN_NAME
from usoflow.nodes.custom_folder import with_custom
from usoflow.nodes.image import clear_previews
from usoflow.schema.node import NodeRegistry
from usoflow.schema.wire import to_json
from usoflow.service import engine
from usoflow.service.engine import Message, Run
from usoflow.service.store import JobStore
from usoflow.settings import Folders

PREVIEWS_CLEARED = 3600.0  # seconds: how often
ENDED_EARLY = "Look at what the server has printed; `usoflow doctor` examines the installation."

if TYPE_CHECKING:
    from usoflow.execution.executor import Executor
    from usoflow.execution.progress import Cancellation, Event
    from usoflow.service.preview import Previewer


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What the server tells a worker at its start."""

    folders: Folders
    store: Path
    device: str = "auto"
    dtype: str = "auto"
    budget: int | None = None
    custom_nodes: Path | None = None
    compiled: bool | None = None

    def to_argument(self) -> str:
        """As one command line argument."""
        return json.dumps(asdict(self), default=lambda path: str(path.absolute()))

    @classmethod
    def from_argument(cls, argument: str) -> WorkerSettings:
        """Back from `to_argument`."""
        record = json.loads(argument)
        there = record.pop("folders")
        folders = Folders(
            models={kind: tuple(map(Path, roots)) for kind, roots in there["models"].items()},
            inputs=tuple(map(Path, there["inputs"])),
            output=Path(there["output"]),
            temp=Path(there["temp"]),
            given_images={name: Path(path) for name, path in there["given_images"].items()},
            named=Path(there["named"]) if there["named"] else None,
        )
        custom = record.pop("custom_nodes")
        store = Path(record.pop("store"))
        return cls(folders, store, custom_nodes=Path(custom) if custom else None, **record)


class Pipe:
    """The worker's end: commands in by way of a queue, messages out from any thread."""

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self.commands: queue.SimpleQueue[Run | engine.Free] = queue.SimpleQueue()
        self.cancellations: dict[str, Cancellation] = {}  # of jobs that are to run, or do
        self._incoming, self._outgoing = incoming, outgoing
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Message) -> None:
        """Write one message; ends the process if nobody reads any more."""
        try:
            with self._lock:
                self._outgoing.write(engine.encode(message))
                self._outgoing.flush()
        except OSError:
            os._exit(0)

    def _read(self) -> None:
        from usoflow.execution.progress import Cancellation

        try:
            for line in self._incoming:
                command = engine.decode(line)
                if isinstance(command, Run):
                    self.cancellations[command.job] = Cancellation()
                if isinstance(command, Run | engine.Free):
                    self.commands.put(command)
                elif isinstance(command, engine.Cancel) and command.job in self.cancellations:
                    self.cancellations[command.job].set()
        finally:  # also after half a command
            os._exit(0)  # the server is gone: nothing may be written any more


@dataclass
class Worker:
    """Runs jobs one after another with the same models."""

    settings: WorkerSettings
    executor: Executor
    previewer: Previewer
    store: JobStore
    send: Callable[[Message], None]
    _preview: bool = field(default=True, init=False)

    def run(self, run: Run, cancellation: Cancellation) -> engine.Outcome:
        """Run a job; whatever happens in it is its outcome."""
        from usoflow.execution.order import NodeError
        from usoflow.workflow.prompt import Prompt

        self.send(engine.Begun())
        folders = self.settings.folders
        self._preview = run.preview
        try:
            prompt = Prompt.parse(run.prompt)
            self.previewer.choose(self.executor.needed(prompt, run.targets), folders)
            self.executor.run(
                prompt,
                run.targets,
                folders,
                workflow=run.workflow,
                listen=self._tell,
                cancellation=cancellation,
                reserve=lambda path: self.store.reserve(run.job, path),
            )
        except NodeError as error:
            return engine.Failed(
                error.code, error.detail, error.remedy, error.node_id, error.class_type, _frames(error)
            )
        except UsoflowError as error:
            if error.code == "cancelled":
                return engine.Cancelled()
            return engine.Failed.by(error, _frames(error))
        except Exception as error:  # a defect ends a job, never the worker with its models
            return engine.Failed.by(error, traceback.format_exception(error))
        return engine.Done()

    def free(self, *, outputs: bool) -> None:
        """Forget models, and outputs if asked to."""
        if outputs:
            self.executor.clear()
        self.executor.library.clear()

    def _tell(self, event: Event) -> None:
        from usoflow.execution.progress import NodeFinished, NodeProgress, NodesCached, NodeStarted

        match event:
            case NodesCached(node_ids, shown):
                self.send(engine.Cached(node_ids, {node: found.record() for node, found in shown.items()}))
            case NodeStarted(node, class_type):
                self.send(engine.Started(node, class_type))
            case NodeProgress(node, step, steps, latent, png):
                wanted = self._preview and latent is not None and step < steps
                picture = self.previewer.jpeg(latent) if wanted and latent is not None else b""
                self.send(engine.Progress(node, step, steps, picture, png))
            case NodeFinished(node_id=node, seconds=seconds, peak_bytes=peak, shown=shown):
                self.send(engine.Finished(node, seconds, peak, shown.record() if shown else None))


def clear_abandoned(output: Path, *, before: float) -> None:
    """Remove the empty files of names that a killed worker had taken `before` that but not yet reserved.

    What it had reserved is the store's to remove. Another program that has taken a name loses nothing: it
    opens its file anew to write it.
    """
    for folder, _, names in os.walk(output):  # which a folder that vanishes does not end
        for partial in (Path(folder, name) for name in names if TAKEN_NAME.search(name)):
            with suppress(OSError):
                state = partial.stat()
                if state.st_size == 0 and state.st_mtime < before:
                    partial.unlink()


def _clear(folders: Folders, before: float) -> None:
    """In a thread: to walk through large folders takes its time. Previews again and again."""
    clear_abandoned(folders.output, before=before)
    while True:
        clear_previews(folders.temp)
        time.sleep(PREVIEWS_CLEARED)


def serve(registry: NodeRegistry, argument: str) -> None:
    """The life of a worker process."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # meant for the server, whose end is ours
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), _disregard)
    pipe = Pipe(*_taken_streams())
    settings = WorkerSettings.from_argument(argument)
    try:
        every = with_custom(registry, settings.custom_nodes)
        worker, system = _made(settings, every, pipe.send)
    except UsoflowError as error:
        pipe.send(engine.Failed.by(error))
        sys.exit(error.exit_code)
    except Exception as error:  # a library that is broken, say
        traceback.print_exc()
        what = f"The worker cannot be loaded: {type(error).__name__}: {error}."
        died = UsoflowError("worker_died", what, remedy=ENDED_EARLY)
        pipe.send(engine.Failed.by(died, traceback.format_exception(error)))
        sys.exit(1)
    pipe.send(engine.Ready(system, tuple(to_json(every[n].schema) for n in every if n not in registry)))
    threading.Thread(target=_clear, args=(settings.folders, time.time()), daemon=True).start()
    while True:
        command = pipe.commands.get()
        outcome = None
        if isinstance(command, Run):
            outcome = worker.run(command, pipe.cancellations[command.job])
            del pipe.cancellations[command.job]
        else:
            worker.free(outputs=command.outputs)
        usable = _tell_of(worker.executor.library.placement.device, pipe.send)
        if outcome is not None:
            pipe.send(outcome)
        if not usable:
            os._exit(1)  # at once: the libraries would only trip over it


def _tell_of(device: Any, send: Callable[[Message], None]) -> bool:
    """Send how much memory is free; False where that cannot be told any more, as after an error of CUDA.

    Nothing can then be computed in this process: another one has to be started.
    """
    try:
        send(engine.Device(_system(device)))
    except Exception:
        traceback.print_exc()
        return False
    return True


def _disregard(*_: object) -> None:
    """Does what SIG_IGN does, but that programs which a node starts do not inherit it."""


def _taken_streams() -> tuple[BinaryIO, BinaryIO]:
    """Commands and messages, which nobody else can read or write.

    What libraries print is no message, and what a node or a program that it starts reads is no command (on
    Windows a thread that waits for a standard stream even holds up whoever asks for it).
    """
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return incoming, outgoing


def _made(
    settings: WorkerSettings, registry: NodeRegistry, send: Callable[[Message], None]
) -> tuple[Worker, dict[str, Any]]:
    from usoflow.execution.executor import Executor
    from usoflow.models.library import ModelLibrary
    from usoflow.models.placement import Placement
    from usoflow.service.preview import Previewer

    placement = Placement.choose(settings.device, settings.dtype, settings.budget, compiled=settings.compiled)
    library = ModelLibrary(placement)
    worker = Worker(settings, Executor(registry, library), Previewer(library), JobStore(settings.store), send)
    return worker, _system(placement.device)


def _system(device: Any) -> dict[str, Any]:
    import torch

    record = {"pytorch_version": torch.__version__, "name": device.type, "type": device.type, "index": None}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        name = f"cuda:0 {torch.cuda.get_device_name()}"
        record |= {"name": name, "index": 0, "vram_total": total, "vram_free": free}
    return record


def _frames(error: BaseException) -> tuple[str, ...]:
    """The traceback of what went wrong inside a node, for a report of the defect."""
    return tuple(traceback.format_exception(error.__cause__)) if error.__cause__ else ()


if __name__ == "__main__":
    from usoflow.nodes import registry as all_nodes

    serve(all_nodes(), sys.argv[1])

"""The engine as a process of its own: started when needed, started again when it died, and why it died.

A kernel that crashes or a model that is too large takes the worker with it, never the server (`worker.py` is
the other end of the pipe).
"""

from __future__ import annotations

import logging
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from usoflow.errors import UsoflowError
from usoflow.schema.specs import NodeSchema
from usoflow.schema.wire import from_json
from usoflow.service.engine import (
    Cancel,
    Command,
    Device,
    Done,
    Failed,
    Free,
    Message,
    Outcome,
    Ready,
    Report,
    Run,
    decode,
    encode,
)
from usoflow.service.engine import Cancelled as CancelledRun
from usoflow.service.worker import ENDED_EARLY, WorkerSettings

logger = logging.getLogger(__name__)

# -P: modules are not looked for in the current folder; -X utf8: nodes may print anything on any system.
WORKER: Sequence[str] = (sys.executable, "-P", "-X", "utf8", "-m", "usoflow.service.worker")
ATTEMPTS = 2  # a worker that died while it was idle is noticed when the next job is given to it
LOADING = 60.0  # seconds that a worker gets to load its libraries and custom nodes while others wait for it
OVERDUE = (
    f"The worker is not ready after {LOADING:.0f} s: what it loads (custom nodes?) may hang. Look at what the"
    " server has printed, and start it without those nodes; a job that is stopped ends this worker."
)
_KERNEL_COUNTERS = Path("/proc/vmstat")
_KILLED = getattr(signal, "SIGKILL", 9)  # which Windows does not have
_SIGNALS: Mapping[int, str] = {
    signal.SIGSEGV: "it crashed with a segmentation fault",
    signal.SIGABRT: "it was aborted by one of its libraries",
    signal.SIGTERM: "it was ended from outside",
}
_WINDOWS_STATUSES: Mapping[int, str] = {  # NTSTATUS, which Windows gives as a positive number
    0xC0000005: "it crashed with an access violation",
    0xC00000FD: "its stack overflowed",
    0xC0000409: "it was aborted by one of its libraries",
    0xC000013A: "it was ended from outside",
}


class WorkerProcess:
    """An `Engine` in a child process.

    Args:
        settings: given to the child.
        command: what to start; the settings follow as its last argument.
        inherited: file descriptors that the child keeps open, for as long as it lives.
    """

    def __init__(
        self, settings: WorkerSettings, *, command: Sequence[str] = WORKER, inherited: Sequence[int] = ()
    ) -> None:
        self._command = [*command, settings.to_argument()]
        self._inherited = tuple(inherited)
        self._lock = threading.Lock()  # guards the process and its stdin
        self._child: _Child | None = None
        self._system: Mapping[str, Any] = {}
        self._nodes: Sequence[Mapping[str, Any]] = ()
        self._fault = ""
        self._job: str | None = None  # that runs
        self._stop = False  # it is to be stopped
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """Of the child, if there is one."""
        return self._child.process.pid if self._child else None

    def start(self) -> None:
        """See `Engine.start`: the child loads its libraries while the server does other things."""
        with suppress(UsoflowError), self._lock:  # the server is stopping already
            self._living()

    def run(self, run: Run, listen: Callable[[Report], None]) -> Outcome:
        """See `Engine.run`."""
        with self._lock:
            self._job, self._stop = run.job, False
        try:
            return self._run(run, listen)
        finally:
            with self._lock:
                self._job = None

    def _run(self, run: Run, listen: Callable[[Report], None]) -> Outcome:
        for attempt in range(ATTEMPTS):
            with self._lock:
                child = self._living()
                child.send(run)
                if self._stop:  # since before it had come to this child
                    child.send(Cancel(run.job))
            begun = False
            while (message := child.messages.get()) is not None:
                if isinstance(message, Done | CancelledRun | Failed):
                    return message
                begun = True
                listen(message)
            cause = child.cause_of_death()
            if begun or attempt == ATTEMPTS - 1 or (self._stop and not child.ready):
                raise cause
        raise AssertionError("unreachable")

    def cancel(self, job: str) -> None:
        """See `Engine.cancel`. A worker that hangs while it loads would never hear of it: it is killed."""
        with self._lock:
            if job != self._job:
                return
            self._stop = True
            if self._child and self._child.overdue:
                self._child.process.kill()
            else:
                self._send(Cancel(job))

    def free(self, *, outputs: bool) -> None:
        """See `Engine.free`."""
        with self._lock:
            self._send(Free(outputs))

    def system(self) -> Mapping[str, Any]:
        """See `Engine.system`; empty until the first child has loaded its libraries."""
        return self._system

    def fault(self) -> str:
        """See `Engine.fault`."""
        child = self._child
        return OVERDUE if child and child.overdue else self._fault

    def nodes(self) -> Sequence[NodeSchema]:
        """See `Engine.nodes`; those of the child before, if this one died or hangs while it loads them."""
        with suppress(UsoflowError):  # the server is stopping
            with self._lock:
                child = self._living()
            child.wait()
        return [from_json(record) for record in self._nodes]

    def stop(self) -> None:
        """See `Engine.stop`. No other child is started."""
        self._stopped = True
        if child := self._child:  # before the lock: who has it may be writing to a child that reads nothing
            child.process.kill()
        with self._lock:
            child, self._child = self._child, None
        if child:
            child.process.kill()
            child.process.wait()

    def _send(self, command: Command) -> None:
        if self._child and self._child.process.poll() is None:
            self._child.send(command)

    def _living(self) -> _Child:
        if self._stopped:
            raise UsoflowError("worker_died", "The server is stopping.")
        if self._child is None or self._child.process.poll() is not None:
            try:
                self._child = _Child(self._command, self._inherited, self._note)
            except OSError as error:
                raise UsoflowError("worker_died", f"The worker cannot be started: {error}.") from None
        return self._child

    def _note(self, news: Ready | Device | UsoflowError) -> None:
        """What a child says of itself."""
        match news:
            case Ready(system, nodes):
                self._system, self._nodes, self._fault = system, nodes, ""
                logger.info("The worker is ready: %s, torch %s", system["name"], system["pytorch_version"])
            case Device(system):
                self._system = system
            case UsoflowError() if not self._stopped:
                self._fault = f"The worker does not start. {news.detail} {news.remedy}"
                logger.error("%s", self._fault)


class _Child:
    """One process and what it has said; None in `messages` is its end; `ready` once it was."""

    def __init__(
        self,
        command: Sequence[str],
        inherited: Sequence[int],
        note: Callable[[Ready | Device | UsoflowError], None],
    ) -> None:
        self._kills_before = _memory_kills()  # later: when the job in progress was sent
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=inherited
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._stdin = self.process.stdin
        self.ready = False
        self._loaded = threading.Event()  # it is ready, or has ended before it was
        self._deadline = time.monotonic() + LOADING
        self._told = False
        self.messages: queue.SimpleQueue[Report | Outcome | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self.process.stdout, note), daemon=True).start()
        threading.Thread(target=_log, args=(self.process.stderr,), daemon=True).start()

    def send(self, command: Command) -> None:
        """Write a command; that a dead process does not take it shows in `messages`."""
        if isinstance(command, Run):
            self._kills_before = _memory_kills()
        try:
            self._stdin.write(encode(command))
            self._stdin.flush()
        except (OSError, ValueError):  # ValueError: closed meanwhile
            return

    def wait(self) -> None:
        """Until it is ready or has ended; but not for ever: a custom node may hang where it is imported."""
        if self._loaded.wait(max(0, self._deadline - time.monotonic())) or self._told:
            return
        self._told = True
        logger.warning("%s What it loads is not known yet.", OVERDUE)

    @property
    def overdue(self) -> bool:
        """Whether it lives and is not ready, although it has had its time."""
        return not self._loaded.is_set() and time.monotonic() > self._deadline

    def cause_of_death(self) -> UsoflowError:
        """Why the process ended."""
        code = self.process.wait()
        if code == -_KILLED and _memory_kills() > self._kills_before:
            return UsoflowError("out_of_memory", "The system ended the worker for want of memory.")
        if code == -_KILLED:
            reason = "it was killed, from outside or by the system for want of memory"
        else:
            known = _SIGNALS.get(-code) or _WINDOWS_STATUSES.get(code)
            reason = known or f"its exit status was {code}"
        if self.ready:
            return UsoflowError("worker_died", f"The worker process ended during the job: {reason}.")
        what = f"The worker process ended before it was ready: {reason}."
        return UsoflowError("worker_died", what, remedy=ENDED_EARLY)

    def _read(self, stdout: IO[bytes], note: Callable[[Ready | Device | UsoflowError], None]) -> None:
        refusal: UsoflowError | None = None
        try:
            with stdout:
                for line in stdout:
                    message: Message = decode(line)
                    if isinstance(message, Ready | Device):
                        note(message)
                        self.ready = True
                        self._loaded.set()
                        continue
                    if isinstance(message, Failed) and not self.ready:
                        refusal = UsoflowError(message.code, message.detail, remedy=message.remedy)
                    if not isinstance(message, Run | Cancel | Free):
                        self.messages.put(message)
        except UsoflowError as error:  # it was killed in the middle of a line, or writes what is no message
            logger.error("%s", error.detail)
            self.process.kill()
        with suppress(OSError):  # a command that it did not take
            self._stdin.close()
        if not self.ready:
            note(refusal or self.cause_of_death())
        self._loaded.set()
        self.messages.put(None)


def _log(stderr: IO[bytes]) -> None:
    """What the worker, its libraries and custom nodes print, line by line."""
    with stderr:
        for line in stderr:
            logger.info("%s", line.decode(errors="replace").rstrip())


def _memory_kills() -> int:
    """How many processes Linux has killed for want of memory since it booted; 0 elsewhere."""
    try:
        match = re.search(r"^oom_kill (\d+)$", _KERNEL_COUNTERS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match.group(1)) if match else 0

"""Takes one job after another from the store, has the engine run it, and writes down how it ended.

Runs in a thread of the server. Tells a listener everything, in the order in which it happens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from usoflow.errors import UsoflowError
from usoflow.schema.values import LONGEST_VALUE, unwrapped
from usoflow.service.engine import (
    Begun,
    Cached,
    Cancelled,
    Engine,
    Failed,
    Finished,
    Outcome,
    Progress,
    Report,
    Run,
    Started,
)
from usoflow.service.jobs import FINAL, Job, State, now
from usoflow.service.store import MAX_ATTEMPTS, JobStore
from usoflow.workflow.prompt import link_of

logger = logging.getLogger(__name__)

GRACE = 8.0  # seconds that a running job gets to finish when the server stops
RETRY = 5.0  # seconds until the store is asked again that could not be used
RESTART = 30.0  # seconds until a worker is started again that could not be

T = TypeVar("T")


@dataclass
class Running:
    """The job in progress, as far as it is: for clients that come later, and for what is said if it fails."""

    job: Job
    node: str = ""
    class_type: str = ""
    executed: list[str] = field(default_factory=list)
    progress: dict[str, Progress] = field(default_factory=dict)
    stop: bool = False  # somebody has asked that it be stopped
    prompt: Mapping[str, Any] = field(default_factory=dict)

    def note(self, report: Report) -> None:
        """Follow the run."""
        match report:
            case Started(node, class_type):
                self.node, self.class_type = node, class_type
                self.progress[node] = Progress(node, 0, 1)
            case Progress():
                self.progress[report.node] = report
            case Finished(node=node):
                self.executed.append(node)
                steps = self.progress[node].steps if node in self.progress else 1
                self.progress[node] = Progress(node, steps, steps)
                self.node = self.class_type = ""


Event = Report | State
Listener = Callable[[Running, Event], None]


class Supervisor:
    """The loop from store to engine.

    Args:
        store: where jobs come from and end.
        engine: runs them.
        listen: is told that a job began (`State.IN_PROGRESS`), every report, and the state it ended in;
            called from the supervisor's thread.
        preview: whether pictures are wanted while a job is sampled.
    """

    def __init__(self, store: JobStore, engine: Engine, listen: Listener, *, preview: bool = True) -> None:
        self._store, self._engine, self._listen, self._preview = store, engine, listen, preview
        self._wake = threading.Event()
        self._taking = threading.Lock()  # from the row's "in_progress" until `running` says which job it is
        self._refused = threading.Event()
        self._thread = threading.Thread(target=self._work, name="supervisor", daemon=True)
        self.running: Running | None = None

    @property
    def stopping(self) -> bool:
        """Whether no more jobs are taken."""
        return self._refused.is_set()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self.stopping

    def start(self) -> None:
        """Begin, with what a crash left behind."""
        self._thread.start()

    def wake(self) -> None:
        """There is a new job."""
        self._wake.set()

    def interrupt(self, job_id: str | None = None) -> bool:
        """Stop the job in progress, if it is this one (None: whichever); whether there was one."""
        with self._taking:
            running = self.running
        if running is None or job_id not in (None, running.job.id):
            return False
        running.stop = True
        self._engine.cancel(running.job.id)
        self._store.note_stop(running.job.id)
        return True

    def refuse(self) -> None:
        """Take no more jobs, from this moment on."""
        self._refused.set()
        self._wake.set()

    def stop(self, grace: float = GRACE) -> None:
        """Take no more jobs; the one in progress may finish within `grace` seconds, else it is requeued.

        One that is being stopped is cancelled instead.
        """
        self.refuse()
        if self._thread.is_alive():
            self._thread.join(grace)
        self._engine.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        self._survive(lambda: self._insist(self._recover))
        while True:
            self._wake.clear()
            if self.stopping:  # looked at after `clear`, so that no wake of `refuse` is missed
                return
            self._survive(self._round)

    def _round(self) -> None:
        running = self._insist(self._take)
        if running is None:
            self._wait()
        else:
            self._execute(running)

    def _survive(self, step: Callable[[], None]) -> None:
        """A defect of our own does not end the queue either; but what follows may meet it again at once."""
        try:
            step()
        except Exception:
            logger.exception("The queue has met a defect. It goes on in %.0f s.", RETRY)
            self._wake.wait(RETRY)

    def _recover(self) -> None:
        """What was in progress at a crash."""
        for job in self._store.recover(_cause_of_crashes):
            logger.info("Job %s was interrupted by the end of the server: it is %s.", job.id, job.state)
            if job.state in FINAL:
                self._listen(Running(job), job.state)

    def _wait(self) -> None:
        """Until there is a new job; a worker that could not be started is started again meanwhile."""
        while not self._wake.wait(RESTART):
            if self._engine.fault():
                self._engine.start()

    def _take(self) -> Running | None:
        """The next job, in progress; whoever looks for it to stop it finds it."""
        with self._taking:
            job = self._store.start_next()
            self.running = None if job is None else Running(job)
            return self.running

    def _execute(self, running: Running) -> None:
        job = running.job
        self._insist(lambda: self._listen(running, State.IN_PROGRESS))
        outcome = self._outcome(running)
        self.running = None
        if outcome is None:
            if self._insist(lambda: self._store.requeue(job.id)):
                logger.info("Job %s is pending again: it runs after the next start of the server.", job.id)
            return
        if running.stop and isinstance(outcome, Failed) and outcome.code == "worker_died":
            outcome = Cancelled()  # as it was asked to, before it came to it
        state, error = _end(running, outcome)
        if self._insist(lambda: self._store.finish(job.id, state, error)) is None:
            return  # the server stops; the next one runs the job again
        ended = self._insist(lambda: self._store.get(job.id))
        # None: it has been deleted meanwhile.
        running.job = ended or replace(job, state=state, ended=now(), error=error)
        reason = f": {outcome.detail}" if isinstance(outcome, Failed) else "."
        logger.info("Job %s %s after %.1f s%s", job.id, state, _seconds(running.job), reason)
        self._insist(lambda: self._listen(running, state))

    def _outcome(self, running: Running) -> Outcome | None:
        """How the run ended; None if it did not, because the server stops."""
        request = self._insist(lambda: self._store.request(running.job.id))
        if request is None:
            return None
        preview = self._preview and request.extra.get("preview_method") != "none"
        run = Run(request.id, request.prompt, request.targets, request.workflow, preview)
        running.prompt = request.prompt
        unnoted: list[Exception] = []

        def listen(report: Report) -> None:
            if isinstance(report, Begun) and running.stop:  # perhaps before the engine had the job
                self._engine.cancel(run.job)
            try:
                self._note(running, report)
            except Exception as error:  # what the job shows could not be kept, say; the run goes to its end
                unnoted.append(error)
                self._engine.cancel(run.job)

        try:
            outcome = self._engine.run(run, listen)
        except Exception as error:  # a defect ends a job, never the queue
            if self.stopping and isinstance(error, UsoflowError):
                return None
            return _failed(error)
        return _failed(unnoted[0]) if unnoted else outcome

    def _insist(self, ask: Callable[[], T]) -> T | None:
        """What the store answers: as long as it cannot be used, again and again; None if the server stops."""
        while True:
            try:
                return ask()
            except UsoflowError as error:
                logger.error("%s %s Trying again in %.0f s.", error.detail, error.remedy, RETRY)
                if self._refused.wait(RETRY):
                    return None

    def _note(self, running: Running, report: Report) -> None:
        running.note(report)
        if isinstance(report, Begun):
            self._store.note_begun(running.job.id)
        elif isinstance(report, Cached):
            self._store.note_cached(running.job.id, report.nodes)
            for node, shown in report.shown.items():
                self._store.note_output(running.job.id, node, shown)
        elif isinstance(report, Finished) and report.shown is not None:
            self._store.note_output(running.job.id, report.node, report.shown)
        self._listen(running, report)


def _end(running: Running, outcome: Outcome) -> tuple[State, dict[str, Any] | None]:
    """The state that a job ends in, and why."""
    if isinstance(outcome, Cancelled):
        return State.CANCELLED, _place(running)
    if isinstance(outcome, Failed):
        return State.FAILED, _failure(running, outcome)
    return State.COMPLETED, None


def _cause_of_crashes(job: Job) -> dict[str, Any]:
    """Why a job fails that was in progress at every one of several ends of the server."""
    detail = f"The server itself was ended {MAX_ATTEMPTS} times while this job ran."
    return _failure(Running(job), Failed.by(UsoflowError("worker_died", detail)))


def _failed(error: Exception) -> Failed:
    if not isinstance(error, UsoflowError):
        logger.error("A job failed.", exc_info=error)
    return Failed.by(error)


def _seconds(job: Job) -> float:
    """How long a job ran."""
    return ((job.ended or 0) - (job.started or 0)) / 1000


def _place(running: Running) -> dict[str, Any]:
    """Where a run stood."""
    return {
        "prompt_id": running.job.id,
        "node_id": running.node,
        "node_type": running.class_type,
        "executed": running.executed,
    }


def _values(prompt: Mapping[str, Any], node_id: str) -> dict[str, list[Any]]:
    """The inputs of a node that are no links, each in a list as ComfyUI tells them; long texts cut."""
    node = prompt.get(node_id)
    inputs = node.get("inputs") if isinstance(node, Mapping) else None
    given = inputs.items() if isinstance(inputs, Mapping) else ()
    values = {name: unwrapped(value) for name, value in given if link_of(value) is None}
    return {n: [v[:LONGEST_VALUE] if isinstance(v, str) else v] for n, v in values.items()}


def _failure(running: Running, failed: Failed) -> dict[str, Any]:
    """The event `execution_error`: what went wrong and what to do about it, at the node where it did."""
    place = _place(running)
    if failed.node:
        place |= {"node_id": failed.node, "node_type": failed.class_type}
    return place | {
        "exception_message": f"{failed.detail}\n{failed.remedy}\n",
        "exception_type": failed.code,
        "traceback": list(failed.traceback),
        "current_inputs": _values(running.prompt, place["node_id"]),
        "current_outputs": [],
    }

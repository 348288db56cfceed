"""From the store to the engine and back, with an engine that does what the test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from e2e.real_server import until
from usoflow.errors import UsoflowError
from usoflow.nodes.context import SavedImage, Shown
from usoflow.schema.specs import NodeSchema
from usoflow.service.engine import (
    Begun,
    Cached,
    Cancelled,
    Done,
    Failed,
    Finished,
    Free,
    Outcome,
    Progress,
    Ready,
    Report,
    Run,
    Started,
    decode,
    encode,
)
from usoflow.service.jobs import Job, Request, State
from usoflow.service.store import MAX_ATTEMPTS, JobStore
from usoflow.service.supervisor import Event, Running, Supervisor

SHOWN = Shown((SavedImage("a.png", "", "output"),)).record()
Play = Callable[[Run, Callable[[Report], None]], Outcome]


class Scripted:
    """An engine that plays a part for each job, by its id."""

    def __init__(self, **parts: Play) -> None:
        self.parts = parts
        self.starts = 0
        self.broken = ""
        self.stopped = threading.Event()
        self.cancelled = threading.Event()

    def run(self, run: Run, listen: Callable[[Report], None]) -> Outcome:
        return self.parts[run.job](run, listen)

    def cancel(self, job: str) -> None:
        self.cancelled.set()

    def free(self, *, outputs: bool) -> None:
        pass

    def system(self) -> Mapping[str, Any]:
        return {}

    def fault(self) -> str:
        return self.broken

    def start(self) -> None:
        self.starts += 1
        self.broken = ""

    def nodes(self) -> Sequence[NodeSchema]:
        return ()

    def stop(self) -> None:
        self.stopped.set()


def good(run: Run, listen: Callable[[Report], None]) -> Outcome:
    listen(Cached(("1",)))
    listen(Started("9", "SaveImage"))
    listen(Progress("9", 1, 2))
    listen(Finished("9", 0.1, 1, SHOWN))
    return Done()


def bad(run: Run, listen: Callable[[Report], None]) -> Outcome:
    listen(Started("3", "KSampler"))
    return Failed("node_failed", "what", "remedy", "3", "KSampler", ("line",))


def deadly(run: Run, listen: Callable[[Report], None]) -> Outcome:
    listen(Started("1", "Loader"))
    listen(Finished("1", 0.1, 1, None))
    listen(Started("3", "KSampler"))
    raise UsoflowError("worker_died", "killed")


Start = Callable[..., Supervisor]


@pytest.fixture
def events() -> list[tuple[str, Event]]:
    """Everything that the listener heard, by job."""
    return []


@pytest.fixture
def start(store: JobStore, events: list[tuple[str, Event]]) -> Iterator[Start]:
    """Start a supervisor over an engine with these parts, one job for each."""
    started: list[Supervisor] = []

    def run(*, accept: bool = True, **parts: Play) -> Supervisor:
        def listen(running: Running, event: Event) -> None:
            events.append((running.job.id, event))

        for name in parts if accept else ():
            store.add(Request(id=name, prompt={}, targets=(), extra={}), limit=10)
        started.append(Supervisor(store, Scripted(**parts), listen))
        started[-1].start()
        return started[-1]

    yield run
    for supervisor in started:
        supervisor.stop(grace=5)


def ended(store: JobStore, name: str) -> Job:
    """The job, when it is in a final state."""
    deadline = time.monotonic() + 10
    while (job := store.get(name)) is None or job.ended is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return job


def test_a_job_that_goes_well(store: JobStore, start: Start, events: list[tuple[str, Event]]) -> None:
    supervisor = start(good=good)
    job = ended(store, "good")
    supervisor.stop()  # the row is final a moment before the listener hears of it
    assert (job.state, job.cached, job.error) == (State.COMPLETED, ["1"], None)
    image = {"filename": "a.png", "subfolder": "", "type": "output"}
    assert job.outputs == {"9": {"images": [image]}}
    assert [event if isinstance(event, State) else type(event) for _, event in events] == [
        State.IN_PROGRESS, Cached, Started, Progress, Finished, State.COMPLETED,
    ]  # fmt: skip


def test_a_defect_ends_a_job_and_not_the_queue(store: JobStore, start: Start) -> None:
    """What nobody foresaw, as an operating system without memory for another process."""

    def unforeseen(run: Run, listen: Callable[[Report], None]) -> Outcome:
        raise OSError(12, "Cannot allocate memory")

    supervisor = start(first=unforeseen, second=good)
    job = ended(store, "first")
    assert job.state == State.FAILED
    assert job.error is not None
    assert "Cannot allocate memory" in job.error["exception_message"]
    assert ended(store, "second").state == State.COMPLETED
    assert supervisor.alive


@pytest.mark.parametrize("part", [bad, deadly])
def test_a_failure_names_its_node_and_the_next_job_runs(store: JobStore, start: Start, part: Play) -> None:
    start(first=part, second=good)
    job = ended(store, "first")
    assert job.state == State.FAILED
    assert job.error is not None
    assert (job.error["node_id"], job.error["node_type"]) == ("3", "KSampler")
    assert job.error["exception_type"] == ("node_failed" if part is bad else "worker_died")
    assert "\n" in job.error["exception_message"]  # the remedy is in it
    assert ended(store, "second").state == State.COMPLETED


def test_interrupt_only_the_job_that_is_meant(store: JobStore, start: Start) -> None:
    begun, go = threading.Event(), threading.Event()

    def waits(run: Run, listen: Callable[[Report], None]) -> Outcome:
        begun.set()
        go.wait(10)
        return Cancelled()

    supervisor = start(waits=waits)
    assert begun.wait(10)
    assert not supervisor.interrupt("another")
    assert supervisor.interrupt("waits")
    go.set()
    assert ended(store, "waits").state == State.CANCELLED
    assert not supervisor.interrupt()


def in_an_endless_step(store: JobStore) -> Supervisor:
    """A supervisor whose job is in a step that only the end of the engine ends."""
    begun = threading.Event()

    def endless(run: Run, listen: Callable[[Report], None]) -> Outcome:
        begun.set()
        assert engine.stopped.wait(10)
        raise UsoflowError("worker_died", "killed by the server")

    engine = Scripted(job=endless)
    store.add(Request(id="job", prompt={}, targets=(), extra={}), limit=10)
    supervisor = Supervisor(store, engine, lambda running, event: None)
    supervisor.start()
    assert begun.wait(10)
    return supervisor


def test_a_job_that_does_not_finish_in_time_runs_again(store: JobStore, start: Start) -> None:
    supervisor = in_an_endless_step(store)
    assert supervisor.alive
    supervisor.stop(grace=0.05)
    assert not supervisor.alive
    assert [(job.id, job.state) for job in store.waiting()] == [("job", State.PENDING)]
    start(accept=False, job=good)
    assert ended(store, "job").state == State.COMPLETED


def test_every_message_survives_the_pipe() -> None:
    images = Shown((SavedImage("ä\n.png", "sub", "temp"),), {"text": ["1"]}).record()
    for message in (
        Run("1", {"9": {"inputs": {"a": [1, "\n"]}}}, ("9",), {"nodes": []}), Cached(("1", "2")),
        Cached(("9",), {"9": images}), Progress("3", 1, 2, b"\xff\xd8\n"), Finished("9", 0.5, 7, images),
        Progress("3", 1, 2, png=b"\x89PNG\r\n"), Free(outputs=True), Free(outputs=False),
        Finished("9", 0.5, 7, None),
        Failed("x", "y", "z", "1", "T", ("a\n", "b")), Done(), Begun(),
    ):  # fmt: skip
        line = encode(message)
        assert line.count(b"\n") == 1
        assert decode(line) == message


@pytest.mark.parametrize("half", ["\udcff", "a \ud83d"], ids=["a byte", "half an emoji"])
def test_what_a_worker_says_can_be_said_to_clients(half: str) -> None:
    """A custom node names a file that is not UTF-8, or cuts a text in the middle of a character."""
    ready = Ready({}, ({"options": [f"{half}.png"]},))
    for message in (Failed("x", half, "z"), Finished("9", 0.5, 7, {"text": [half], half: 1}), ready):
        heard = decode(encode(message))
        assert "\ufffd" in repr(heard)
        json.dumps(asdict(heard), ensure_ascii=False).encode()
    assert decode(encode(Failed("x", "\U0001f408", "z"))) == Failed("x", "\U0001f408", "z")


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b'{"message": "Nothing"}', b'{"message": "Done", "x": 1}']
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(UsoflowError):
        decode(line)


def test_a_job_that_is_being_stopped_when_the_server_stops_does_not_run_again(
    store: JobStore, start: Start
) -> None:
    """Its step in progress takes longer than the server waits."""
    supervisor = in_an_endless_step(store)
    assert supervisor.interrupt("job")
    supervisor.stop(grace=0.05)
    assert ended(store, "job").state == State.CANCELLED
    start(accept=False, job=good)
    assert ended(store, "job").state == State.CANCELLED


def test_a_job_that_is_being_stopped_when_its_worker_dies_is_cancelled(store: JobStore, start: Start) -> None:
    def dies(run: Run, listen: Callable[[Report], None]) -> Outcome:
        assert engine.cancelled.wait(10)
        raise UsoflowError("worker_died", "killed from outside")

    supervisor = start(dies=dies)
    engine: Scripted = supervisor._engine  # type: ignore[assignment]
    until(lambda: supervisor.interrupt("dies"))
    assert ended(store, "dies").state == State.CANCELLED


def test_a_stop_while_a_job_is_being_taken_reaches_it(
    store: JobStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, take = threading.Event(), store.start_next

    def slow() -> Job | None:
        job = take()
        if job is not None:
            taken.set()
            time.sleep(0.1)  # the row says "in_progress", and nobody knows yet which job that is
        return job

    monkeypatch.setattr(store, "start_next", slow)

    def patient(run: Run, listen: Callable[[Report], None]) -> Outcome:
        return Cancelled() if supervisor._engine.cancelled.wait(5) else Done()  # type: ignore[attr-defined]

    supervisor = start(patient=patient, accept=False)
    store.add(Request(id="patient", prompt={}, targets=(), extra={}), limit=10)
    supervisor.wake()
    assert taken.wait(5)
    assert supervisor.interrupt("patient")
    assert ended(store, "patient").state == State.CANCELLED


def test_what_a_cached_node_shows_is_an_output_of_the_job(store: JobStore, start: Start) -> None:
    def known(run: Run, listen: Callable[[Report], None]) -> Outcome:
        listen(Cached(("1", "9"), {"9": SHOWN}))
        return Done()

    start(job=known)
    assert ended(store, "job").outputs == {"9": SHOWN}


def test_a_store_that_cannot_be_used_for_a_while_ends_nothing(
    store: JobStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a locked file."""
    monkeypatch.setattr("usoflow.service.supervisor.RETRY", 0.01)
    for name in ("recover", "start_next", "request", "finish"):
        monkeypatch.setattr(store, name, failing(getattr(store, name), times=3))
    supervisor = start(first=good, second=good)
    for name in ("first", "second"):
        assert ended(store, name).state == State.COMPLETED
        assert ended(store, name).outputs == {"9": SHOWN}
    assert supervisor.alive


def test_a_job_whose_output_cannot_be_noted_fails_and_the_next_one_runs(
    store: JobStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "note_output", failing(store.note_output, times=1))
    start(first=good, second=good)
    first = ended(store, "first")
    assert first.state == State.FAILED
    assert first.error is not None
    assert first.error["exception_type"] == "state_unusable"
    assert ended(store, "second").state == State.COMPLETED


def test_a_run_is_heard_to_its_end_although_nobody_can_be_told(
    store: JobStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next job would get what this one says."""
    heard: list[str] = []

    def talks(run: Run, listen: Callable[[Report], None]) -> Outcome:
        for node in ("1", "2"):
            listen(Started(node, "KSampler"))
            heard.append(node)
        return Done()

    def odd(running: Running, report: Report) -> None:
        raise TypeError("no JSON can say that")

    monkeypatch.setattr(Running, "note", odd)
    supervisor = start(first=talks)
    first = ended(store, "first")
    assert heard == ["1", "2"]
    assert supervisor._engine.cancelled.is_set()  # type: ignore[attr-defined]
    assert first.state == State.FAILED
    assert first.error is not None
    assert "no JSON can say that" in first.error["exception_message"]


def test_a_stop_while_the_store_cannot_be_used_leaves_the_job_to_the_next_server(
    store: JobStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        tried = threading.Event()

        def full(*_: object) -> bool:
            tried.set()
            raise UsoflowError("state_unusable", "disk full")

        broken.setattr(store, "finish", full)
        supervisor = start(job=good)
        assert tried.wait(10)
        supervisor.stop(grace=5)
        assert not supervisor.alive
    start(accept=False, job=good)
    assert ended(store, "job").state == State.COMPLETED


def test_a_job_that_ends_the_server_each_time_fails_and_its_client_is_told(
    store: JobStore, start: Start, events: list[tuple[str, Event]]
) -> None:
    for name in ("deadly", "good"):
        store.add(Request(id=name, prompt={}, targets=(), extra={}), limit=10)
    store.start_next()
    for _ in range(MAX_ATTEMPTS):
        store.note_begun("deadly")
    start(accept=False, good=good)
    job = ended(store, "deadly")
    assert job.state == State.FAILED
    assert job.error is not None
    assert (job.error["exception_type"], job.error["prompt_id"]) == ("worker_died", "deadly")
    assert "3 times" in job.error["exception_message"]
    assert ended(store, "good").state == State.COMPLETED
    assert events[0] == ("deadly", State.FAILED)


def test_each_beginning_counts_whatever_comes_after_it(store: JobStore, start: Start) -> None:
    """A job may end worker and server while it is only looked at."""
    ends: list[State] = []

    def begins(run: Run, listen: Callable[[Report], None]) -> Outcome:
        for _ in range(MAX_ATTEMPTS):  # of as many servers
            listen(Begun())
        ends.extend(job.state for job in store.recover(lambda job: {}))
        return Done()

    start(deadly=begins)
    until(lambda: ends)  # which is known a moment after the store knows it
    assert ends == [State.FAILED]


def test_a_worker_that_could_not_be_started_is_started_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a job, which nobody sends to a server that is not ready."""
    monkeypatch.setattr("usoflow.service.supervisor.RESTART", 0.02)
    engine: Scripted = start()._engine  # type: ignore[assignment]
    time.sleep(0.1)
    assert engine.starts == 0
    engine.broken = "The device is in use."
    until(lambda: not engine.fault())
    assert engine.starts == 1


@pytest.mark.parametrize(("extra", "wanted"), [({}, True), ({"preview_method": "none"}, False)])
def test_who_wants_no_previews_gets_none(
    store: JobStore, start: Start, extra: dict[str, str], wanted: bool
) -> None:
    asked: list[bool] = []

    def notes(run: Run, listen: Callable[[Report], None]) -> Outcome:
        asked.append(run.preview)
        return Done()

    store.add(Request(id="job", prompt={}, targets=(), extra=extra), limit=10)
    start(accept=False, job=notes)
    ended(store, "job")
    assert asked == [wanted]


def failing(method: Callable[..., Any], *, times: int) -> Callable[..., Any]:
    """A method of the store that fails at first."""
    left = [times]

    def called(*values: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise UsoflowError("state_unusable", "disk full")
        return method(*values, **named)

    return called


def test_a_failure_tells_the_values_of_its_node(store: JobStore, start: Start) -> None:
    """Each in a list, as ComfyUI does; what a link gave is not told, a long text not to its end."""
    inputs = {
        "steps": 4,
        "model": ["1", 0],
        "text": "x" * 10_000,
        "list": {"__value__": [1, 2]},
        "none": None,
    }
    prompt = {"3": {"class_type": "KSampler", "inputs": inputs}}
    store.add(Request(id="first", prompt=prompt, targets=(), extra={}), limit=10)
    start(accept=False, first=bad)
    job = ended(store, "first")
    assert job.error is not None
    values = {"steps": [4], "text": ["x" * 1000], "list": [[1, 2]], "none": [None]}
    assert job.error["current_inputs"] == values


def test_a_stop_before_the_engine_has_the_job_is_told_to_it_again(
    store: JobStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which remembers only what is said of the job that it runs."""
    ask = store.request

    def slow(job: str) -> Request | None:
        assert supervisor.interrupt(job)
        return ask(job)

    def runs(run: Run, listen: Callable[[Report], None]) -> Outcome:
        engine.cancelled.clear()
        listen(Begun())
        return Cancelled() if engine.cancelled.is_set() else Done()

    monkeypatch.setattr(store, "request", slow)
    supervisor = start(accept=False, job=runs)
    engine: Scripted = supervisor._engine  # type: ignore[assignment]
    store.add(Request(id="job", prompt={}, targets=(), extra={}), limit=10)
    supervisor.wake()
    assert ended(store, "job").state == State.CANCELLED


@pytest.mark.parametrize(("part", "state"), [(good, State.COMPLETED), (bad, State.FAILED)])
def test_a_job_that_is_deleted_as_it_ends_has_ended_so(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, part: Play, state: State
) -> None:
    """Its client is told what has become of it, not that it is in progress."""
    finish, told = store.finish, []

    def finished(*values: Any) -> bool:
        done = finish(*values)
        store.forget()
        return done

    def listen(running: Running, event: Event) -> None:
        if event == state:
            told.append(running.job)

    monkeypatch.setattr(store, "finish", finished)
    store.add(Request(id="job", prompt={}, targets=(), extra={}), limit=10)
    supervisor = Supervisor(store, Scripted(job=part), listen)
    supervisor.start()
    until(lambda: told)
    supervisor.stop()
    assert (told[0].state, told[0].ended is not None) == (state, True)
    assert (told[0].error is not None) == (state == State.FAILED)


@pytest.mark.parametrize("broken", ["recover", "start_next", "finish"])
def test_a_defect_of_our_own_does_not_end_the_queue(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    method, calls = getattr(store, broken), []

    def once(*values: Any) -> Any:
        calls.append(values)
        if len(calls) == 1:
            raise IndexError("nobody foresaw this")
        return method(*values)

    monkeypatch.setattr("usoflow.service.supervisor.RETRY", 0.05)
    monkeypatch.setattr(store, broken, once)
    for name in ("first", "second"):
        store.add(Request(id=name, prompt={}, targets=(), extra={}), limit=10)
    supervisor = Supervisor(store, Scripted(first=good, second=good), lambda *_: None)
    supervisor.start()
    try:
        assert ended(store, "second").state == State.COMPLETED
        assert supervisor.alive
        assert "nobody foresaw this" in caplog.text
    finally:
        supervisor.stop()

"""The table of jobs: order, states, files, crashes, limits, versions."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from usoflow.errors import UsoflowError
from usoflow.service import jobs
from usoflow.service import store as store_module
from usoflow.service.jobs import FINAL, WAITING, Request, State
from usoflow.service.store import JobStore


def add(store: JobStore, job_id: str, **more: Any) -> jobs.Job:
    """Accept a job."""
    values: dict[str, Any] = {"prompt": {"1": {}}, "targets": ("1",), "extra": {}} | more
    return store.add(Request(id=job_id, **values), limit=100)


def failure(job: jobs.Job) -> dict[str, Any]:
    """Why a job fails that has seen too many crashes."""
    return {"exception_type": f"of {job.id}"}


def test_first_come_first_served_but_for_the_front(store: JobStore) -> None:
    for name in ("a", "b", "c"):
        add(store, name)
    add(store, "now", front=True)
    add(store, "between", number=0.5)
    assert [job.id for job in store.waiting()] == ["now", "a", "between", "b", "c"]
    assert [store.start_next().id for _ in range(5)] == ["now", "a", "between", "b", "c"]  # type: ignore[union-attr]
    assert store.start_next() is None
    assert add(store, "last", front=True, number=7.5).number == 7.5  # who gives a number has said where


def test_what_was_asked_for_comes_back(store: JobStore) -> None:
    extra = {"extra_pnginfo": {"workflow": {"id": "w", "nodes": []}}}
    prompt = {"9": {"class_type": "SaveImage", "inputs": {"text": "ü\n\"'"}}}
    job = add(store, "a", prompt=prompt, extra=extra, client="me", targets=("9", "10"))
    request = store.request("a")
    assert (request.prompt, request.targets, request.extra) == (prompt, ("9", "10"), extra)
    assert request.client == "me"
    assert request.workflow == {"id": "w", "nodes": []}
    assert (job.workflow, job.state, job.started, job.outputs) == ("w", State.PENDING, None, {})


def test_outputs_by_any_node_id(store: JobStore) -> None:
    add(store, "a")
    store.start_next()
    for node in ("9", "112:31", 'a"b.$[0]', ""):
        store.note_output("a", node, {"images": [{"filename": node}]})
    store.finish("a", State.COMPLETED)
    job = store.get("a")
    assert job is not None
    assert job.outputs == {n: {"images": [{"filename": n}]} for n in ("9", "112:31", 'a"b.$[0]', "")}


def test_a_final_state_stays(store: JobStore) -> None:
    add(store, "a")
    assert not store.finish("a", State.COMPLETED)  # it has not begun
    store.start_next()
    assert store.finish("a", State.FAILED, {"exception_type": "x"})
    assert not store.finish("a", State.COMPLETED)
    store.requeue("a")
    job = store.get("a")
    assert job is not None
    assert (job.state, job.error) == (State.FAILED, {"exception_type": "x"})


def test_full_queue_and_taken_ids(store: JobStore) -> None:
    add(store, "a")
    with pytest.raises(UsoflowError) as caught:
        add(store, "a")
    assert caught.value.code == "job_exists"
    request = Request(id="b", prompt={}, targets=(), extra={})
    with pytest.raises(UsoflowError) as caught:
        store.add(request, limit=1)
    assert caught.value.code == "queue_full"
    assert store.get("b") is None


def test_only_what_waits_is_cancelled_only_what_is_final_forgotten(store: JobStore) -> None:
    for name in ("running", "a", "b"):
        add(store, name)
    store.start_next()
    assert store.cancel_pending(["running", "a", "unknown"]) == 1
    store.forget(["running", "b"])
    assert {job.id: job.state for job in store.jobs([*WAITING, *FINAL])} == {
        "running": State.IN_PROGRESS, "a": State.CANCELLED, "b": State.PENDING,
    }  # fmt: skip
    store.forget()
    assert store.get("a") is None
    many = [str(number) for number in range(100_000)]  # more than SQL takes as single values
    assert store.cancel_pending([*many, "b"]) == 1


def test_pages(store: JobStore) -> None:
    for number in range(5):
        add(store, str(number))
    store.start_next()
    found = [job.id for job in store.jobs(WAITING, limit=2, offset=1)]
    assert found == ["3", "2"]


def test_history_is_ordered_by_the_end(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1_000_000, 10_000))
    monkeypatch.setattr(store_module, "now", lambda: next(clock))
    for name in ("a", "b"):
        add(store, name)
    add(store, "first", front=True)
    for _ in range(3):
        job = store.start_next()
        assert job
        store.finish(job.id, State.COMPLETED)
    add(store, "never ran")
    store.cancel_pending()
    assert [job.id for job in store.run_jobs(limit=2)] == ["b", "a"]
    assert [job.id for job in store.run_jobs(limit=9, descending=False)] == ["first", "a", "b"]


@pytest.mark.skipif(os.name != "posix", reason="paths are text there")
def test_a_path_that_is_no_text(store: JobStore, tmp_path: Path) -> None:
    add(store, "job")
    store.start_next()
    path = tmp_path / os.fsdecode(b"caf\xe9") / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"")
    store.reserve("job", path)
    assert store._files("job") == [path]
    assert store.requeue("job")
    assert not path.exists()
    assert store._files("job") == []


def test_paths_of_an_older_version_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(store_module, "MIGRATIONS", store_module.MIGRATIONS[:3])
        store = JobStore(tmp_path / "old.sqlite")
        add(store, "job")
        store._connection.execute("INSERT INTO files VALUES (?, ?)", ("/there/ä.png", "job"))
        store.close()
    again = JobStore(tmp_path / "old.sqlite")
    assert again._files("job") == [Path("/there/ä.png")]
    again.close()


def test_order_of_duration(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1_000_000, 10_000))
    for name, seconds in (("middle", 5), ("long", 9), ("short", 2)):
        add(store, name)
        begin = next(clock)
        monkeypatch.setattr(store_module, "now", lambda begin=begin: begin)
        store.start_next()
        monkeypatch.setattr(store_module, "now", lambda end=begin + seconds: end)
        store.finish(name, State.COMPLETED)
    add(store, "waiting")
    every = [*WAITING, *FINAL]
    longest = [job.id for job in store.jobs(every, by_duration=True)]
    assert longest == ["long", "middle", "short", "waiting"]
    assert [job.id for job in store.jobs(every, by_duration=True, descending=False)] == longest[::-1]
    assert [job.id for job in store.jobs(every, by_duration=True, limit=1, offset=1)] == ["middle"]


def test_history_is_pruned(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_HISTORY", 2)
    for number in range(4):
        add(store, str(number))
        store.start_next()
        store.finish(str(number), State.COMPLETED)
    assert [job.id for job in store.jobs(FINAL)] == ["3", "2"]


def test_what_never_began_pushes_out_nothing_that_ran(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_HISTORY", 4)
    monkeypatch.setattr(store_module, "MAX_UNBEGUN", 2)
    for number in range(2):
        add(store, f"ran {number}")
        store.start_next()
        store.finish(f"ran {number}", State.COMPLETED)
    for number in range(5):
        add(store, f"unbegun {number}")
        store.cancel_pending()
    assert [job.id for job in store.jobs(FINAL)] == ["unbegun 4", "unbegun 3", "ran 1", "ran 0"]
    assert [job.id for job in store.jobs(FINAL, unbegun=False)] == ["ran 1", "ran 0"]
    assert (store.count(FINAL), store.count(FINAL, unbegun=False)) == (4, 2)
    add(store, "stopped")
    store.start_next()
    store.finish("stopped", State.CANCELLED)
    assert "stopped" in [job.id for job in store.jobs(FINAL, unbegun=False)]


def test_after_a_crash_the_job_runs_again_and_its_files_are_gone(store: JobStore, tmp_path: Path) -> None:
    add(store, "a", front=True)
    add(store, "b")
    store.start_next()
    done, partial, other = (tmp_path / name for name in ("a_1_.png", "a_2_.part", "other.png"))
    for path in (done, partial, other):
        path.touch()
    store.reserve("a", done)
    store.reserve("a", partial.with_suffix(".png"))
    store.note_output("a", "9", {"images": []})
    assert [job.id for job in store.recover(failure)] == ["a"]
    assert [path.exists() for path in (done, partial, other)] == [False, False, True]
    again = store.start_next()
    assert again is not None
    assert (again.id, again.outputs) == ("a", {})


def test_a_job_that_is_there_at_every_crash_fails_at_last(tmp_path: Path) -> None:
    """As one that takes so much memory that the system ends the server as well."""
    for name in ("deadly", "next"):
        store = JobStore(tmp_path / "jobs.sqlite")
        add(store, name)
        store.close()
    ends = []
    for _ in range(store_module.MAX_ATTEMPTS):
        store = JobStore(tmp_path / "jobs.sqlite")
        started = store.start_next()
        assert started is not None
        store.note_begun(started.id)
        store.close()  # killed
        store = JobStore(tmp_path / "jobs.sqlite")
        ends += [(job.id, job.state, job.error) for job in store.recover(failure)]
        store.close()
    again = ("deadly", State.PENDING, None)
    assert ends == [again, again, ("deadly", State.FAILED, {"exception_type": "of deadly"})]
    store = JobStore(tmp_path / "jobs.sqlite")
    assert [job.id for job in store.waiting()] == ["next"]
    store.close()


def test_neither_an_orderly_stop_nor_a_start_without_a_worker_counts(store: JobStore) -> None:
    add(store, "a")
    for _ in range(3 * store_module.MAX_ATTEMPTS):
        store.start_next()
        store.note_begun("a")
        assert store.requeue("a")
    for _ in range(3 * store_module.MAX_ATTEMPTS):
        store.start_next()
        assert [job.state for job in store.recover(failure)] == [State.PENDING]


def test_files_are_told_apart_by_their_folders_too(store: JobStore, tmp_path: Path) -> None:
    """A workflow that saves under one name in several folders, and stops between two of them."""
    add(store, "a")
    store.start_next()
    paths = {name: tmp_path / "out" / f"{name}a_1_.png" for name in ("", "x/", "x/y/", "z/")}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.with_suffix(".part").write_bytes(b"half")
        store.reserve("a", path)
    shown = [{"filename": "a_1_.png", "subfolder": folder, "type": "output"} for folder in ("", "x")]
    store.note_output("a", "9", {"images": shown})
    store.finish("a", State.FAILED)
    assert {name for name, path in paths.items() if path.exists()} == {"", "x/"}
    assert {name for name, path in paths.items() if path.with_suffix(".part").exists()} == {"", "x/"}


def test_files_of_a_failed_job_stay_if_they_were_reported(store: JobStore, tmp_path: Path) -> None:
    add(store, "a")
    store.start_next()
    done, partial, unreported = (tmp_path / name for name in ("a_1_.png", "a_2_.part", "a_3_.png"))
    for path in (done, partial, unreported):
        path.touch()
        store.reserve("a", path.with_suffix(".png"))
    store.note_output("a", "9", {"images": [{"filename": "a_1_.png"}]})
    store.finish("a", State.FAILED)
    assert [path.exists() for path in (done, partial, unreported)] == [True, False, False]


def test_everything_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    first = JobStore(path)
    add(first, "a")
    first.set_settings({"Comfy.X": [1, "\r\n[section]"]})
    second = JobStore(path)  # while the first is open: as a worker does, or a server after a crash
    assert second.get("a") == first.get("a")
    assert second.settings() == {"Comfy.X": [1, "\r\n[section]"]}
    first.close()
    second.close()


def test_a_newer_or_damaged_file_is_refused(tmp_path: Path) -> None:
    newer, damaged = tmp_path / "newer.sqlite", tmp_path / "damaged.sqlite"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    damaged.write_bytes(b"no database" * 1000)
    for path in (newer, damaged):
        with pytest.raises(UsoflowError) as caught:
            JobStore(path)
        assert caught.value.code == "state_unusable"


@pytest.mark.parametrize("version", range(len(store_module.MIGRATIONS)))
def test_every_migration_leads_to_a_store_that_works(tmp_path: Path, version: int) -> None:
    path = tmp_path / "jobs.sqlite"
    connection = sqlite3.connect(path)
    for script in store_module.MIGRATIONS[:version]:
        connection.executescript(script)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    store = JobStore(path)
    add(store, "a")
    assert store.start_next() is not None
    store.close()


def test_a_stop_is_remembered(tmp_path: Path) -> None:
    """Also over a crash of the server; a picture that was shown stays, one that was only begun does not."""
    store = JobStore(tmp_path / "jobs.sqlite")
    for name in ("a", "b"):
        add(store, name)
        store.note_stop(name)  # it has not begun: that is not how it is cancelled
    assert store.start_next() is not None
    shown, begun = tmp_path / "shown.png", tmp_path / "begun.png"
    for path in (shown, begun):
        path.touch()
        store.reserve("a", path)
    store.note_output("a", "9", {"images": [{"filename": "shown.png"}], "x": None})
    store.note_stop("a")
    assert [job.state for job in store.recover(failure)] == [State.CANCELLED]
    found = store.get("a")
    assert found is not None
    assert (found.state, found.ended is not None) == (State.CANCELLED, True)
    assert found.outputs["9"]["x"] is None
    assert (shown.exists(), begun.exists()) == (True, False)
    assert store.start_next() is not None
    assert [(job.id, job.state) for job in store.recover(failure)] == [("b", State.PENDING)]
    store.close()


class Lives(RuleBasedStateMachine):
    """Whatever happens in whatever order: no job is lost, none runs twice, a final state stays."""

    def __init__(self) -> None:
        super().__init__()
        self.store = JobStore(Path(":memory:"))
        self.states: dict[str, State] = {}
        self.stopped: set[str] = set()
        self.begun: Counter[str] = Counter()

    @rule(front=st.booleans())
    def accept(self, front: bool) -> None:
        name = f"job {len(self.states)}"
        add(self.store, name, front=front)
        self.states[name] = State.PENDING

    @rule()
    def start(self) -> None:
        waiting = {name for name, state in self.states.items() if state == State.PENDING}
        job = self.store.start_next()
        assert (job.id in waiting) if job else not waiting
        if job:
            self.states[job.id] = State.IN_PROGRESS

    @rule(state=st.sampled_from(FINAL), data=st.data())
    def finish(self, state: State, data: st.DataObject) -> None:
        if self.states:
            name = data.draw(st.sampled_from(sorted(self.states)))
            if self.store.finish(name, state):
                assert self.states[name] == State.IN_PROGRESS
                self.states[name] = state

    @rule()
    def stop(self) -> None:
        running = {name for name, state in self.states.items() if state == State.IN_PROGRESS}
        for name in running:
            self.store.note_stop(name)
        self.stopped |= running

    @rule()
    def crash(self) -> None:
        running = {name for name, state in self.states.items() if state == State.IN_PROGRESS}
        for name in running:
            hopeless = State.FAILED if self.begun[name] >= store_module.MAX_ATTEMPTS else State.PENDING
            self.states[name] = State.CANCELLED if name in self.stopped else hopeless
        found = {job.id: job.state for job in self.store.recover(failure)}
        assert found == {name: self.states[name] for name in running}

    @rule()
    def begin(self) -> None:
        for name, state in self.states.items():
            if state == State.IN_PROGRESS:
                self.store.note_cached(name, [])
                self.begun[name] += 1

    @rule()
    def cancel(self) -> None:
        self.store.cancel_pending()
        self.states = {n: State.CANCELLED if s == State.PENDING else s for n, s in self.states.items()}

    @invariant()
    def agree(self) -> None:
        assert {job.id: job.state for job in self.store.jobs([*WAITING, *FINAL])} == self.states

    def teardown(self) -> None:
        self.store.close()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)


def test_a_full_disk_is_an_error_that_says_so_and_not_for_ever(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UsoflowError) as caught:
        store.add(Request(id="large", prompt={"x": "y" * 100_000}, targets=(), extra={}), limit=10)
    assert caught.value.code == "state_unusable"
    assert "full" in caught.value.detail
    store._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    store.add(Request(id="large", prompt={"x": "y" * 100_000}, targets=(), extra={}), limit=10)
    assert [job.id for job in store.waiting()] == ["large"]
    assert store.request("none") is None
    store.close()


def test_what_runs_comes_before_the_front(store: JobStore) -> None:
    add(store, "runs")
    store.start_next()
    add(store, "now", front=True)
    assert [job.id for job in store.waiting()] == ["runs", "now"]


def test_with_a_job_its_files_are_forgotten(store: JobStore, tmp_path: Path) -> None:
    add(store, "a")
    store.start_next()
    store.reserve("a", tmp_path / "a.png")
    store.note_output("a", "9", {"images": [{"filename": "a.png"}]})
    store.finish("a", State.COMPLETED)
    store.forget()
    assert store._connection.execute("SELECT count(*) FROM files").fetchone()[0] == 0


def test_a_job_that_is_cancelled_by_a_restart_says_so_as_others_do(store: JobStore) -> None:
    """Nobody knows any more at which node it was."""
    add(store, "a")
    store.start_next()
    store.note_stop("a")
    (job,) = store.recover(failure)
    assert job.error == {"prompt_id": "a", "node_id": "", "node_type": "", "executed": []}


@pytest.mark.parametrize("odd", [None, "text", [5], [{"source": "data:,"}], [{"filename": None}]])
def test_a_job_ends_whatever_its_nodes_have_shown(store: JobStore, tmp_path: Path, odd: object) -> None:
    add(store, "a")
    store.start_next()
    begun, shown = tmp_path / "begun.png", tmp_path / "shown.png"
    for path in (begun, shown):
        path.touch()
        store.reserve("a", path)
    store.note_output("a", "8", {"images": odd})
    store.note_output("a", "9", {"images": [{"filename": "shown.png", "subfolder": None, "format": "x"}]})
    assert store.finish("a", State.CANCELLED)
    assert (begun.exists(), shown.exists()) == (False, True)


def test_a_job_that_is_deleted_while_a_crash_is_mended_is_no_defect(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody clears the history at that moment."""
    for name in ("deadly", "other"):
        add(store, name)
        store.start_next()
    for _ in range(store_module.MAX_ATTEMPTS):
        store.note_begun("deadly")
    finish = store.finish

    def finished(*values: Any) -> bool:
        done = finish(*values)
        store.forget()
        return done

    monkeypatch.setattr(store, "finish", finished)
    assert [job.id for job in store.recover(failure)] == ["other"]

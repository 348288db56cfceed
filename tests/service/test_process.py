"""The worker as a real process: a picture comes out; whatever kills it is named, and the next job runs."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from e2e.real_server import until
from small import text_to_image, with_inputs
from usoflow.errors import UsoflowError
from usoflow.service.engine import (
    Begun,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Finished,
    Progress,
    Report,
    Run,
    Started,
)
from usoflow.service.jobs import Request
from usoflow.service.lock import hold
from usoflow.service.process import WorkerProcess
from usoflow.service.store import JobStore
from usoflow.service.worker import WorkerSettings
from usoflow.settings import find_folders

HOSTILE = (sys.executable, str(Path(__file__).parent / "hostile_worker.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the state and the outputs."""
    return tmp_path_factory.mktemp("process")


@pytest.fixture(scope="module")
def engine(place: Path, small_models: Path) -> Iterator[WorkerProcess]:
    """One worker for all tests: each leaves it, or its successor, able to work."""
    folders = find_folders(models=small_models, inputs=small_models.parent / "input", output=place / "output")
    store = JobStore(place / "jobs.sqlite")
    settings = WorkerSettings(folders, place / "jobs.sqlite", device="cpu", dtype="fp32")
    found = WorkerProcess(settings, command=HOSTILE)
    for name in ("picture", "cancelled", "killed", "after"):
        store.add(Request(id=name, prompt={}, targets=(), extra={}), limit=100)
    yield found
    found.stop()
    store.close()


def prompt_with(class_type: str) -> dict[str, object]:
    """A node that does something terrible, and the output that needs it."""
    return {
        "bad": {"class_type": class_type, "inputs": {}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["bad", 0], "filename_prefix": "bad"}},
    }


def test_a_worker_is_told_all_its_settings(place: Path) -> None:
    folders = find_folders(models=place, output=place / "output")
    given = WorkerSettings(folders, place / "jobs.sqlite", "cpu", "bf16", 8 * 10**9, place, False)
    told = WorkerSettings.from_argument(given.to_argument())
    assert (told.device, told.dtype, told.budget) == ("cpu", "bf16", 8 * 10**9)
    assert (told.store, told.custom_nodes) == (given.store, given.custom_nodes)
    assert told.compiled is False


def test_a_job_becomes_a_picture(engine: WorkerProcess, place: Path) -> None:
    prompt = with_inputs(text_to_image(), "sampler", steps=3)
    reports: list[Report] = []
    assert engine.run(Run("picture", prompt, ("save",), None), reports.append) == Done()
    assert engine.system()["type"] == "cpu"
    saved = [report.shown for report in reports if isinstance(report, Finished) and report.shown]
    assert [image["filename"] for image in saved[0]["images"]] == ["out_00001_.png"]
    with Image.open(place / "output" / "out_00001_.png") as picture:
        assert picture.size == (64, 64)
    steps = [(r.node, r.step, r.steps) for r in reports if isinstance(r, Progress)]
    assert steps == [("sampler", 1, 3), ("sampler", 2, 3), ("sampler", 3, 3)]
    previews = [report.preview for report in reports if isinstance(report, Progress) and report.preview]
    with Image.open(io.BytesIO(previews[0])) as preview:
        assert (preview.format, preview.size) == ("JPEG", (64, 64))
    store = JobStore(place / "jobs.sqlite")
    store.start_next()
    assert store._files("picture") == [place / "output" / "out_00001_.png"]
    store.close()


@pytest.mark.parametrize("outputs", [False, True])
def test_models_are_forgotten_and_outputs_if_asked(engine: WorkerProcess, outputs: bool) -> None:
    def started(seed: int) -> list[str]:
        reports: list[Report] = []
        prompt = with_inputs(text_to_image(), "sampler", seed=seed)
        assert engine.run(Run("after", prompt, ("save",), None), reports.append) == Done()
        return [report.node for report in reports if isinstance(report, Started)]

    started(3)
    engine.free(outputs=outputs)
    assert (len(started(3)) > 0) == outputs
    engine.free(outputs=outputs)
    assert "sampler" in started(4)  # with models that are loaded again


@pytest.mark.parametrize("moment", [Begun, Progress])
def test_cancelled(engine: WorkerProcess, moment: type) -> None:
    prompt = with_inputs(text_to_image(), "sampler", steps=10_000, seed=7)
    assert engine.run(Run("picture", text_to_image(), ("save",), None), lambda _: None) == Done()

    def stop(report: Report) -> None:
        if isinstance(report, moment):
            engine.cancel("cancelled")

    assert engine.run(Run("cancelled", prompt, ("save",), None), stop) == Cancelled()


def test_a_stop_of_what_does_not_run_is_none_of_what_runs_later(engine: WorkerProcess) -> None:
    """It came when the job had just ended; another one may get its id."""
    engine.cancel("after")
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    engine.cancel("after")
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()


def test_an_error_in_a_node_is_an_outcome(engine: WorkerProcess) -> None:
    outcome = engine.run(Run("x", prompt_with("Raises"), ("save",), None), lambda _: None)
    assert isinstance(outcome, Failed)
    assert (outcome.code, outcome.node, outcome.class_type) == ("node_failed", "bad", "Raises")
    assert any("ZeroDivisionError" in line for line in outcome.traceback)


@pytest.mark.parametrize(
    ("prompt", "code", "node", "words"),
    [
        ({"out": {"class_type": "Deep", "inputs": {}}}, "node_failed", "", "RecursionError"),
        ({"out": {"class_type": "Gone", "inputs": {}}}, "node_unknown", "out", "no such node any more"),
        ({"out": 5}, "not_a_workflow", "", "neither"),
    ],
)
def test_what_nobody_foresaw_ends_the_job_alone(
    engine: WorkerProcess, prompt: dict[str, object], code: str, node: str, words: str
) -> None:
    """A prompt of an earlier server, whose custom nodes are gone, say: the worker keeps its models."""
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    before = engine.pid
    reports: list[Report] = []
    outcome = engine.run(Run("x", prompt, ("out",), None), reports.append)
    assert reports[0] == Begun()
    assert isinstance(outcome, Failed)
    assert (outcome.code, outcome.node) == (code, node)
    assert words in outcome.detail
    assert any(words in line for line in outcome.traceback) == (code == "node_failed")
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    assert engine.pid == before


def test_programs_that_nodes_start_can_be_ended(engine: WorkerProcess) -> None:
    assert engine.run(Run("after", prompt_with("Stops"), ("save",), None), lambda _: None) == Done()


def test_a_stop_that_comes_too_late_is_none_of_a_later_job(engine: WorkerProcess) -> None:
    """Of the same id, which is free again once the first is forgotten."""
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    assert engine._child is not None
    engine._child.send(Cancel("after"))
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()


def test_what_nodes_read_is_no_command(engine: WorkerProcess) -> None:
    assert engine.run(Run("after", prompt_with("Reads"), ("save",), None), lambda _: None) == Done()


def test_modules_in_the_current_folder_are_not_the_workers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise AssertionError")
    monkeypatch.chdir(tmp_path)
    engine = WorkerProcess(WorkerSettings(find_folders(output=place / "output"), place / "jobs.sqlite"))
    engine.start()
    engine.nodes()  # waits for it
    assert engine.fault() == ""
    assert engine.system()["pytorch_version"]
    engine.stop()


def test_what_nodes_print_is_no_message(engine: WorkerProcess) -> None:
    assert engine.run(Run("after", prompt_with("Prints"), ("save",), None), lambda _: None) == Done()


@pytest.mark.parametrize(
    ("class_type", "words"),
    [
        ("Crashes", "segmentation fault"),
        pytest.param("Aborts", "aborted", marks=pytest.mark.full),
        pytest.param("Exits", "status was 3", marks=pytest.mark.full),
    ],
)
def test_a_crash_is_named_and_the_next_job_runs(engine: WorkerProcess, class_type: str, words: str) -> None:
    with pytest.raises(UsoflowError, match=words) as caught:
        engine.run(Run("x", prompt_with(class_type), ("save",), None), lambda _: None)
    assert caught.value.code == "worker_died"
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()


@pytest.mark.parametrize(("more", "code"), [(0, "worker_died"), (1, "out_of_memory")])
def test_killed_while_it_samples(
    engine: WorkerProcess, monkeypatch: pytest.MonkeyPatch, more: int, code: str
) -> None:
    """For want of memory, if the system has ended something so during this job, not before it."""
    kills = [0]
    monkeypatch.setattr("usoflow.service.process._memory_kills", lambda: kills[0])

    def kill(report: Report) -> None:
        if isinstance(report, Progress) and report.step == 1:
            kills[0] += more
            kill_worker(engine)

    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    kills[0] = 5
    prompt = with_inputs(text_to_image(), "sampler", steps=10_000, seed=8)
    with pytest.raises(UsoflowError) as caught:
        engine.run(Run("killed", prompt, ("save",), None), kill)
    assert caught.value.code == code


def test_killed_while_idle_costs_no_job(engine: WorkerProcess) -> None:
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    kill_worker(engine)
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()


def test_what_was_to_be_cancelled_is_so_by_the_next_worker(
    engine: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was given the job has died before it began with it."""
    prompt = with_inputs(text_to_image(), "sampler", steps=10_000, seed=9)
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    child = engine._child
    assert child is not None
    why = child.cause_of_death

    def told() -> UsoflowError:
        engine.cancel("cancelled")
        return why()

    monkeypatch.setattr(child, "send", lambda command: child.process.kill())
    monkeypatch.setattr(child, "cause_of_death", told)
    assert engine.run(Run("cancelled", prompt, ("save",), None), lambda _: None) == Cancelled()


def test_a_worker_that_cannot_start_says_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    broken = WorkerProcess(WorkerSettings(find_folders(), place / "jobs.sqlite", device="cuda"))
    try:
        assert broken.fault() == ""
        broken.start()
        until(broken.fault)
        assert "does not start" in broken.fault()
        assert "cuda" in broken.fault().lower()
        outcome = broken.run(Run("x", text_to_image(), ("save",), None), lambda _: None)
        assert isinstance(outcome, Failed)
        assert outcome.code == "device_unavailable"
    finally:
        broken.stop()


def test_a_worker_that_hangs_while_it_loads_is_told_of_and_can_be_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", "1")
    monkeypatch.setattr("usoflow.service.process.LOADING", 0.5)
    worker = WorkerProcess(WorkerSettings(find_folders(), place / "jobs.sqlite"), command=HOSTILE)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(worker.run, Run("x", text_to_image(), ("save",), None), lambda _: None)
        until(worker.fault)
        assert "may hang" in worker.fault()
        worker.cancel("x")
        with pytest.raises(UsoflowError) as caught:
            run.result(60)
    assert caught.value.code == "worker_died"  # which the supervisor takes for cancelled
    worker.stop()


def test_a_library_that_is_broken_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = WorkerProcess(WorkerSettings(find_folders(), place / "jobs.sqlite"))
    try:
        outcome = worker.run(Run("x", text_to_image(), ("save",), None), lambda _: None)
        assert isinstance(outcome, Failed)
        assert "libcudart.so.12" in outcome.detail
        assert "doctor" in outcome.remedy
        assert outcome.traceback
        until(worker.fault)
        assert "libcudart.so.12" in worker.fault()
    finally:
        worker.stop()


def test_a_worker_that_reads_nothing_can_be_ended(place: Path, engine: WorkerProcess) -> None:
    """What it is sent does not fit into the pipe, and whoever sends it waits."""
    worker = WorkerProcess(WorkerSettings(find_folders(), place / "jobs.sqlite"), command=HOSTILE)
    worker.start()
    until(worker.system)
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    large = Run("x", text_to_image(), ("save",), {"nodes": ["x" * 2_000_000]})
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(worker.run, large, lambda _: None)
        time.sleep(0.5)
        pool.submit(worker.stop).result(30)
        with pytest.raises(UsoflowError, match=r"stopping|killed"):
            run.result(30)


def test_memory_that_runs_out_is_named(engine: WorkerProcess) -> None:
    """A limit on the address space, so that the allocator really fails."""
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()
    status = Path(f"/proc/{engine.pid}/status").read_text(encoding="ascii")
    used = int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) * 1024
    assert engine.pid
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    outcome = engine.run(Run("x", prompt_with("Hungry"), ("save",), None), lambda _: None)
    assert isinstance(outcome, Failed)
    assert outcome.code == "out_of_memory"
    assert engine.run(Run("after", text_to_image(), ("save",), None), lambda _: None) == Done()


def test_the_worker_ends_with_its_server(engine: WorkerProcess, place: Path) -> None:
    """Also in the middle of a job, and with the lock that it inherited."""
    lock = hold(place / "lock")
    worker = WorkerProcess(
        WorkerSettings(find_folders(), place / "jobs.sqlite"), command=HOSTILE, inherited=[lock]
    )
    started = threading.Event()

    def note(report: Report) -> None:
        if isinstance(report, Started):
            started.set()

    def run() -> None:
        with pytest.raises(UsoflowError):
            worker.run(Run("x", prompt_with("Sleeps"), ("save",), None), note)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    os.close(lock)
    with pytest.raises(UsoflowError) as caught:
        hold(place / "lock", patience=0.1)
    assert caught.value.code == "state_in_use"
    assert worker._child is not None
    worker._child._stdin.close()  # as when the server dies
    os.close(hold(place / "lock"))
    thread.join()
    worker.stop()


def test_the_worker_ends_with_a_server_that_was_killed_while_it_wrote(place: Path) -> None:
    """What has come of the command is no command."""
    settings = WorkerSettings(find_folders(output=place / "output"), place / "jobs.sqlite", device="cpu")
    worker = WorkerProcess(settings)
    worker.start()
    try:
        until(worker.system)
        child = worker._child
        assert child is not None
        child._stdin.write(b'{"message": "Ru')
        child._stdin.close()
        assert child.process.wait(20) == 0
    finally:
        worker.stop()


def kill_worker(engine: WorkerProcess) -> None:
    """Kill -9."""
    assert engine.pid
    os.kill(engine.pid, signal.SIGKILL)


def test_names_that_a_killed_worker_had_taken_are_free_again(tmp_path: Path) -> None:
    """Empty partial files go, also in subfolders; what has content belongs to somebody."""
    from usoflow.service.worker import clear_abandoned

    (tmp_path / "sub").mkdir()
    for name in ("a_00001_.part", "sub/b_00001_.part"):
        (tmp_path / name).touch()
    (tmp_path / "c_00001_.part").write_bytes(b"half a picture")
    (tmp_path / "d_00001_.png").touch()
    (tmp_path / "sub" / "ubuntu.iso.part").touch()  # another program's
    clear_abandoned(tmp_path, before=time.time() - 60)  # a worker that has begun meanwhile writes them
    assert (tmp_path / "a_00001_.part").exists()
    clear_abandoned(tmp_path, before=time.time() + 60)
    kept = ["c_00001_.part", "d_00001_.png", "ubuntu.iso.part"]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == kept
    clear_abandoned(tmp_path / "absent", before=time.time())


def test_a_folder_that_vanishes_keeps_no_name_taken_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usoflow.service.worker import clear_abandoned

    for folder in ("a", "gone", "z"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x_00001_.part").touch()
    listed = os.scandir

    def vanished(path: os.PathLike[str] | str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr("os.scandir", vanished)
    clear_abandoned(tmp_path, before=time.time() + 60)
    monkeypatch.undo()
    assert [path.parent.name for path in tmp_path.rglob("*.part")] == ["gone"]


def test_a_worker_does_not_wait_for_a_large_folder(place: Path) -> None:
    """One of a million pictures, on a disk in another room."""
    code = (
        "import sys, time; from usoflow.service import worker; from usoflow.nodes import registry;"
        "worker.clear_abandoned = lambda *_, **__: time.sleep(600); worker.serve(registry(), sys.argv[1])"
    )
    engine = WorkerProcess(
        WorkerSettings(find_folders(output=place / "output"), place / "jobs.sqlite", device="cpu"),
        command=(sys.executable, "-c", code),
    )
    engine.start()
    try:
        until(engine.system)
    finally:
        engine.stop()


@pytest.mark.parametrize(
    "code", ["print('{\"message\": \"Star', end='')", "print('nonsense', flush=True); input(); input()"]
)
def test_what_is_no_message_ends_the_worker_and_nobody_waits_for_it(
    code: str, place: Path, small_models: Path
) -> None:
    """The first was killed while it wrote."""
    folders = find_folders(models=small_models, output=place / "output")
    settings = WorkerSettings(folders, place / "jobs.sqlite")
    engine = WorkerProcess(settings, command=(sys.executable, "-c", code))
    with pytest.raises(UsoflowError) as caught:
        engine.run(Run("half", {}, (), None), lambda report: None)
    assert caught.value.code == "worker_died"
    assert engine.nodes() == []
    engine.stop()


def test_nobody_waits_for_ever_for_a_worker_that_hangs(
    place: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A custom node waits for something where it is imported, say; who asks later does not wait at all."""
    monkeypatch.setattr("usoflow.service.process.LOADING", 0.5)
    settings = WorkerSettings(
        find_folders(models=small_models, output=place / "output"), place / "jobs.sqlite"
    )
    engine = WorkerProcess(settings, command=(sys.executable, "-c", "input()"))
    try:
        begin = time.monotonic()
        assert engine.nodes() == []
        assert time.monotonic() - begin >= 0.5
        monkeypatch.setattr("usoflow.service.process.LOADING", 600)
        assert engine.nodes() == []
        (line,) = [record.message for record in caplog.records if "not ready" in record.message]
        assert "custom nodes" in line
    finally:
        engine.stop()


LOSES_ITS_DEVICE = """
import sys
from usoflow.nodes import registry
from usoflow.service import worker

tell, asked = worker._system, []

def system(device):
    asked.append(device)
    if len(asked) > 1:  # the first time is when it starts
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return tell(device)

worker._system = system
worker.serve(registry(), sys.argv[1])
"""


def test_a_worker_that_has_lost_its_device_says_why_the_job_failed_and_ends(place: Path) -> None:
    """After some errors of CUDA nothing more can be asked of it; the next job gets a new worker."""
    settings = WorkerSettings(find_folders(output=place / "output"), place / "jobs.sqlite", device="cpu")
    engine = WorkerProcess(settings, command=(sys.executable, "-c", LOSES_ITS_DEVICE))
    try:
        for _ in range(2):
            run = Run("x", {"out": {"class_type": "Gone", "inputs": {}}}, ("out",), None)
            outcome = engine.run(run, lambda _: None)
            assert isinstance(outcome, Failed)
            assert outcome.code == "node_unknown"
            child = engine._child
            assert child is not None
            until(lambda child=child: child.process.poll() is not None)
    finally:
        engine.stop()

"""What is being replaced is lost only when what replaces it is whole."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from usoflow.api.saving import save

FULL = """
import resource, signal, sys
from usoflow import UsoflowError, Workflow
workflow = Workflow.load("template:flux1_dev_uso_reference_image_gen")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    workflow.save(sys.argv[1])
except UsoflowError as error:
    sys.exit(error.detail)
"""


def test_a_full_disk_costs_no_graph(tmp_path: Path) -> None:
    """In a process of its own, with a limit on file sizes for the disk."""
    graph = tmp_path / "graph.json"
    graph.write_text("hours of work")
    done = subprocess.run([sys.executable, "-c", FULL, graph], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert graph.read_text() == "hours of work"
    assert list(tmp_path.iterdir()) == [graph]


def test_a_link_stays_one_and_who_may_read_it_stays(tmp_path: Path) -> None:
    (tmp_path / "graph").write_text("a")
    (tmp_path / "graph").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "graph")
    save(tmp_path / "link", b"b")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "graph").read_text() == "b"
    assert (tmp_path / "graph").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reading:
        save(tmp_path / "pipe", b"words")
        assert reading.communicate(timeout=60)[0] == b"words"


@pytest.mark.skipif(os.name != "posix", reason="folders are not synced there")
def test_content_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power could leave an empty file under the name."""
    file, synced = tmp_path / "graph", []
    sync = os.fsync

    def noted(number: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(number).st_mode), file.exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", noted)
    save(file, b"a")
    assert synced == [(False, False), (True, True)]


@pytest.mark.skipif(os.name != "posix", reason="folders are not opened there")
def test_a_folder_that_cannot_be_synced_still_gets_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to it may perhaps not read it; some network drives sync no folder."""
    opened = os.open

    def refused(path: str | Path, *more: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *more)

    monkeypatch.setattr(os, "open", refused)
    save(tmp_path / "graph", b"a")
    assert (tmp_path / "graph").read_bytes() == b"a"

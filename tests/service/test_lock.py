"""The lock of the state's folder; that a worker inherits it is in `test_process`."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from usoflow.errors import UsoflowError
from usoflow.service import lock
from usoflow.service.lock import hold


def test_one_at_a_time(tmp_path: Path) -> None:
    held = hold(tmp_path / "new" / "lock")
    with pytest.raises(UsoflowError) as caught:
        hold(tmp_path / "new" / "lock", patience=0)
    assert caught.value.code == "state_in_use"
    os.close(held)
    os.close(hold(tmp_path / "new" / "lock", patience=0))


def test_waiting_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "TELL_AFTER", 0.0)
    held = hold(tmp_path / "lock")
    with caplog.at_level("INFO", "usoflow"), pytest.raises(UsoflowError):
        hold(tmp_path / "lock", patience=0.2)
    os.close(held)
    told = [record.message for record in caplog.records]
    assert told == [f"{tmp_path} is in use: waiting up to 0 s for its server to end."]


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/usoflow"])
def test_what_can_be_no_folder_is_a_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    state = tmp_path / name
    with pytest.raises(UsoflowError) as caught:
        hold(state / "lock")
    assert caught.value.code == "state_unusable"
    assert f"{state} cannot be used as a folder: " in caught.value.detail


@pytest.mark.skipif(sys.platform == "win32", reason="flock(2)")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refused(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(UsoflowError, match="cannot be locked") as caught:
        hold(tmp_path / "lock")
    assert caught.value.code == "state_unusable"

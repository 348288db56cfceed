"""Standard streams as a shell gives them: closed, full, a terminal. In processes of their own."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

MISSING = "run none.json"
COLOUR = b"\x1b["


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line for `sh`, in which `usoflow` is ours."""
    ours = f'usoflow() {{ {shlex.quote(sys.executable)} -m usoflow "$@"; }}; '
    return subprocess.run(
        ["sh", "-c", ours + line], cwd=folder, env=os.environ | variables, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(small_models: Path, tmp_path: Path, closed: str) -> None:
    options = "--size=32x32 --steps=1 --device=cpu --dtype=fp32 --json"
    done = shell(f"usoflow generate 'a cat' --models {small_models} {options} {closed}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["ComfyUI_00001_.png"]
    assert shell(f"usoflow {MISSING} {closed}", tmp_path).returncode == 2


def test_a_full_stderr_changes_no_exit_code(tmp_path: Path) -> None:
    assert shell(f"usoflow {MISSING} 2>/dev/full", tmp_path).returncode == 2
    variables = {"XDG_DATA_HOME": str(tmp_path), "HOME": str(tmp_path), "USOFLOW_MODELS": ""}  # a warning
    done = shell("usoflow generate 'a cat' --size=32x32 --steps=1 2>/dev/full", tmp_path, **variables)
    assert done.returncode == 0
    assert Path(tmp_path, done.stdout.splitlines()[0]).is_file()


@pytest.mark.parametrize("command", ["generate x", "run none.json", "models", "doctor"])
def test_a_working_folder_that_is_gone(tmp_path: Path, command: str) -> None:
    done = shell(f"mkdir gone && cd gone && rmdir ../gone; usoflow {command}", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "not there any more" in done.stderr
    assert "cd" in done.stderr


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb", "NO_COLOR": ""}, False),
    ],
)
def test_colours_are_for_who_wants_them(tmp_path: Path, variables: dict[str, str], coloured: bool) -> None:
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "usoflow", *MISSING.split()]
    subprocess.run(command, stderr=stderr, cwd=tmp_path, env=os.environ | variables, check=False)
    os.close(stderr)
    said = os.read(terminal, 10_000)
    os.close(terminal)
    assert b"none.json" in said
    assert (COLOUR in said) == coloured


@pytest.mark.parametrize(("key", "code"), [("ctrl-c", 130), ("ctrl-d", 2)])
def test_who_does_not_answer_has_not_agreed(tmp_path: Path, key: str, code: int) -> None:
    """A terminal on which nobody agrees to the licences; no folder is made for nothing."""
    terminal, inner = pty.openpty()
    command = [sys.executable, "-m", "usoflow", "models", "pull", "--models", "new/folder"]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, cwd=tmp_path) as asked:
        os.close(inner)
        said = b""
        while b"[y/N]" not in said:
            said += os.read(terminal, 10_000)
        try:
            for _ in range(30):
                if key == "ctrl-c":  # one that comes before the terminal is read from is not seen yet
                    asked.send_signal(signal.SIGINT)
                else:
                    os.write(terminal, b"\x04")
                with suppress(subprocess.TimeoutExpired):
                    asked.wait(2)
                    break
        finally:
            asked.kill()
        assert asked.returncode == code
    os.close(terminal)
    assert list(tmp_path.iterdir()) == []

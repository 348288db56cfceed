"""`usoflow serve` as it is started: who is let in."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import httpx2 as httpx
import pytest
from fastapi import FastAPI

import small
from e2e.real_server import RealServer, until
from usoflow.cli.serve import STATE_VARIABLE, serve
from usoflow.errors import UsoflowError


@pytest.mark.parametrize(("given", "added"), [("", ""), ("a+b&c", "?token=a%2Bb%26c")])
def test_beyond_this_machine_a_token_is_needed(
    small_models: Path, tmp_path: Path, given: str, added: str
) -> None:
    """One that was made up is told; one that was given is not, for the log may be read by others."""
    (tmp_path / "input").mkdir()
    options = ("--no-ui", "--listen", "0.0.0.0", "--token", given)
    server = RealServer(small_models, tmp_path, options=options)
    try:
        server.start()
        assert httpx.get(f"{server.url}/queue").status_code == 401
        address = (tmp_path / "log").read_text().split()[1]
        assert ("?token=" in address) == (not given)
        assert httpx.get(address + added, follow_redirects=False).status_code == 303
        if given:
            return
        server.kill()
        server.start()
        assert httpx.get(address, follow_redirects=False).status_code == 303  # open pages go on
        assert (tmp_path / "state" / "token").stat().st_mode & 0o777 == 0o600
    finally:
        server.kill()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_is_no_crash(small_models: Path, tmp_path: Path, ignored: bool) -> None:
    """The end is that of SIGTERM, by which nothing is lost; nohup keeps it away."""
    (tmp_path / "input").mkdir()
    server = RealServer(small_models, tmp_path, options=("--no-ui",))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        server.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        assert server.process
        job = server.submit(small.text_to_image())
        until(lambda: server.get(f"/jobs/{job}")["status"] != "pending")
        for process in (server.process.pid, server.worker()):  # as a terminal does
            assert process
            os.kill(process, signal.SIGHUP)
        if ignored:
            assert server.ended(job)["status"] == "completed"
            assert server.answers()
        else:
            assert server.process.wait(30) == -signal.SIGTERM
            server.start()
            assert server.ended(job)["status"] == "completed"
    finally:
        server.kill()


def test_what_the_server_could_not_keep_is_told_at_its_start(small_models: Path, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("no folder")
    (tmp_path / "input").mkdir()
    server = RealServer(small_models, tmp_path, options=("--no-ui",))
    server.start(wait=False)
    assert server.process
    assert server.process.wait(60) != 0
    log = (tmp_path / "log").read_text()
    assert "can be written to" in log
    assert "Traceback" not in log


def test_a_script_may_connect_as_soon_as_the_address_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the server's own start, after which requests are answered."""

    def connect(app: FastAPI, bound: socket.socket) -> None:
        assert "http://127.0.0.1:" in capsys.readouterr().out
        with bound, socket.create_connection(bound.getsockname(), timeout=5):
            pass
        app.state.server.opened.close()

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr("usoflow.server.serving.serve", connect)
    serve(output=tmp_path / "output", port=port, ui=False)


def test_an_address_of_a_kind_that_this_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(family: int) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr("usoflow.cli.serve.socket.socket", lacking)
    with pytest.raises(UsoflowError, match=":: cannot be used") as caught:
        serve(output=tmp_path / "output", listen="::", token="x", ui=False)
    assert caught.value.code == "address_unusable"

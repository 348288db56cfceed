"""`usoflow serve` as it is started: who is let in."""

from __future__ import annotations

from pathlib import Path

import httpx2 as httpx
import pytest

from e2e.real_server import RealServer


@pytest.mark.parametrize(("given", "link"), [("", "/?token="), ("a+b&c", "/?token=a%2Bb%26c")])
def test_beyond_this_machine_a_token_is_needed(
    small_models: Path, tmp_path: Path, given: str, link: str
) -> None:
    (tmp_path / "input").mkdir()
    options = ("--no-ui", "--listen", "0.0.0.0", "--token", given)
    server = RealServer(small_models, tmp_path, options=options)
    try:
        server.start()
        assert httpx.get(f"{server.url}/queue").status_code == 401
        address = (tmp_path / "log").read_text().split()[1]
        assert link in address
        assert httpx.get(address, follow_redirects=False).status_code == 303
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

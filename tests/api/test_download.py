"""A server that misbehaves, and two downloads of one file. `tests/cli/test_models.py` has the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from usoflow.api.download import _fetch, _held, _Source
from usoflow.errors import UsoflowError

DATA = bytes(range(100))


@contextmanager
def mirror(*lengths: int) -> Iterator[tuple[_Source, list[int]]]:
    """A server that knows no ranges and breaks off after so many bytes, by turns; what it has sent."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(lengths[len(sent) % len(lengths)])
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA[: sent[-1]])

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield _Source(f"http://127.0.0.1:{server.server_address[1]}/", {}, len(DATA), ""), sent
    finally:
        server.shutdown()
        server.server_close()


def test_a_mirror_without_ranges_that_breaks_off_now_here_now_there_is_given_up(tmp_path: Path) -> None:
    with mirror(20, 10) as (source, sent), pytest.raises(UsoflowError) as caught:
        _fetch("model", source, tmp_path / "part", lambda done, total: None if len(sent) < 10 else 1 / 0)
    assert caught.value.code == "download_failed"
    assert sent == [20, 10]


def test_as_long_as_there_is_more_each_time_it_is_tried_again(tmp_path: Path) -> None:
    with mirror(10, 20, 100) as (source, sent):
        _fetch("model", source, tmp_path / "part", lambda done, total: None)
    assert (tmp_path / "part").read_bytes() == DATA
    assert len(sent) == 3


def test_two_downloads_of_one_file_do_not_spoil_each_other(tmp_path: Path) -> None:
    part = tmp_path / "part"
    with _held("model", part):
        with pytest.raises(UsoflowError, match="another download") as caught, _held("model", part):
            pass
        assert "Wait" in caught.value.remedy
        with _held("other", tmp_path / "other"):
            pass
    with _held("model", part):  # when the first has ended
        pass

"""Each hole that was published of ComfyUI, tried on us: one test a hole.

Symlinked `/view`, `Origin: null`, CRLF into a configuration, `/userdata` escape, stored XSS through `/view`,
pickles, and paths read by way of previews.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from server.conftest import SOCKET, prompt
from server.test_files import picture, upload
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile


def test_symbolic_links_lead_nowhere(client: TestClient, place: Path) -> None:
    (place / "secret.png").write_bytes(picture())
    (place / "output" / "link.png").symlink_to(place / "secret.png")
    (place / "output" / "folder").symlink_to(place)
    (place / "output" / "circle").symlink_to(place / "output" / "circle")
    for parameters in (
        {"filename": "link.png"},
        {"filename": "secret.png", "subfolder": "folder"},
        {"filename": "circle"},
    ):
        assert client.get("/view", params=parameters).status_code in (400, 404)


def test_origin_null_is_refused(client: TestClient) -> None:
    """What a sandboxed frame or a local file sends: it may neither submit, nor read, nor listen."""
    headers = {"origin": "null"}
    assert client.post("/prompt", json={"prompt": prompt()}, headers=headers).status_code == 403
    assert client.get("/api/history", headers=headers).status_code == 403
    data = {"image": ("a.png", picture(), "image/png")}
    assert client.post("/upload/image", files=data, headers=headers).status_code == 403
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(SOCKET, headers=headers):
        pass
    assert client.get("/jobs").json()["jobs"] == []


def test_settings_are_values_whatever_they_are(client: TestClient) -> None:
    """No line break in a value or key becomes another setting."""
    assert client.get("/api/settings").json() == {}
    assert client.post("/api/settings/Comfy.A", content=b'"x\\r\\nComfy.B = 1"').status_code == 200
    assert client.post("/api/settings", json={"C\r\nD": [1], "Comfy.E": None}).status_code == 200
    assert client.get("/api/settings").json() == {
        "Comfy.A": "x\r\nComfy.B = 1",
        "C\r\nD": [1],
        "Comfy.E": None,
    }
    assert client.get("/api/settings/Comfy.A").json() == "x\r\nComfy.B = 1"
    assert client.get("/api/settings/none").json() is None
    assert client.post("/api/settings", json=[1]).status_code == 400


@pytest.mark.parametrize("way", ["read", "write", "delete", "move away", "move here", "list"])
@pytest.mark.parametrize(
    "name", ["..%2Fsecret", "%2e%2e%2fsecret", "workflows%2F..%2F..%2Fsecret", "link%2Fsecret"]
)
def test_userdata_stays_in_its_folder(client: TestClient, place: Path, way: str, name: str) -> None:
    secret = place / "state" / "secret"
    secret.write_text("secret", encoding="utf-8")
    (place / "state" / "user" / "link").symlink_to(place / "state")
    client.post("/userdata/own", content=b"own")
    requests = {
        "read": lambda: client.get(f"/userdata/{name}"),
        "write": lambda: client.post(f"/userdata/{name}", content=b"changed"),
        "delete": lambda: client.delete(f"/userdata/{name}"),
        "move away": lambda: client.post(f"/userdata/{name}/move/stolen"),
        "move here": lambda: client.post(f"/userdata/own/move/{name}"),
        "list": lambda: client.get(f"/userdata?dir={name.rpartition('%2F')[0] or '..'}&recurse=true"),
    }
    answer = requests[way]()
    assert answer.status_code in (400, 404), answer.text
    assert secret.read_text(encoding="utf-8") == "secret"
    assert not (place / "state" / "user" / "stolen").exists()


def test_nothing_active_is_served(client: TestClient, place: Path) -> None:
    """Stored XSS through /view: whatever lies in the output folder, under whatever name."""
    for name, data in {
        "a.html": b"<script>alert(1)</script>",
        "a.svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "a.js": b"alert(1)",
        "page.png": b"<script>alert(1)</script>",
    }.items():
        (place / "output" / name).write_bytes(data)
        headers = client.get(f"/view?filename={name}").headers
        assert headers["content-type"] == "application/octet-stream"
        assert headers["content-disposition"].startswith("attachment")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    (place / "output" / "picture.html").write_bytes(picture())
    assert client.get("/view?filename=picture.html").headers["content-type"] == "image/png"


def test_a_saved_page_is_only_data(client: TestClient) -> None:
    client.post("/userdata/x.html", content=b"<script>alert(1)</script>")
    headers = client.get("/userdata/x.html").headers
    assert headers["content-type"] == "application/octet-stream"
    assert "sandbox" in headers["Content-Security-Policy"]


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["evil.ckpt", "evil.pt", "evil.safetensors"])
def test_no_pickle_is_loaded(client: TestClient, small_models: Path, tmp_path: Path, name: str) -> None:
    """Neither offered nor taken by a loader: a bare pickle and torch's zip of one, under any name."""
    trace = tmp_path / "trace"
    bare = pickle.dumps(Payload(trace))
    for form in ("bare", "zip"):
        path = small_models / "loras" / name
        if form == "bare":
            path.write_bytes(bare)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", bare)
        try:
            if not name.endswith(".safetensors"):
                assert name not in client.get("/models/loras").json()
                graph = prompt() | {
                    "lora": {
                        "class_type": "LoraLoaderModelOnly",
                        "inputs": {"lora_name": name, "strength_model": 1.0, "model": ["loader", 0]},
                    }
                }
                graph["sampler"]["inputs"]["model"] = ["lora", 0]
                refused = client.post("/prompt", json={"prompt": graph})
                assert refused.status_code == 400
                assert refused.json()["node_errors"]["lora"]["errors"][0]["type"] == "value_not_in_list"
            with pytest.raises(UsoflowError) as caught:
                TensorFile.open(path)
            assert caught.value.code in ("model_pickle", "model_damaged")
        finally:
            path.unlink()
    assert not trace.exists()
    pickle.loads(bare)
    assert trace.exists()  # that is what would have happened


def test_previews_read_no_path(client: TestClient, place: Path) -> None:
    """By way of a preview's parameters or folder, of LoadImage, or of a mask's original."""
    (place / "secret.png").write_bytes(picture())
    upload(client, picture(), "a.png")
    for parameters in (
        {"filename": "a.png", "type": "input", "preview": "../../secret.png"},
        {"filename": "a.png", "type": "input", "channel": "../../secret.png"},
    ):  # a format and a channel: no path at all
        assert client.get("/view", params=parameters).headers["content-type"].startswith("image/")
    for parameters in (
        {"filename": "secret.png", "subfolder": "..", "type": "temp", "preview": "webp"},
        {"filename": "../secret.png [temp]"},
        {"filename": "secret.png", "type": ".."},
        {"filename": str(place / "secret.png"), "type": "temp"},
    ):
        assert client.get("/view", params=parameters).status_code in (400, 404)
    for name in ("../secret.png", "../secret.png [output]", str(place / "secret.png"), "..\\secret.png"):
        graph = prompt() | {"load": {"class_type": "LoadImage", "inputs": {"image": name}}}
        graph["save"]["inputs"]["images"] = ["load", 0]
        answer = client.post("/prompt", json={"prompt": graph})
        assert answer.json()["node_errors"]["load"]["errors"][0]["type"] == "custom_validation_failed"

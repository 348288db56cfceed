"""The editor's files, the templates that it offers, and what a server without torch can answer."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from server.conftest import Serve
from usoflow.server import picture, templates, ui
from usoflow.server.routes import system
from usoflow.workflow.flatten import EDITOR_NODES

USO = "flux1_dev_uso_reference_image_gen"


def test_uso_comes_first_and_nothing_is_offered_that_cannot_run(client: TestClient) -> None:
    index = client.get("/templates/index.json")
    assert index.headers["content-type"] == "application/json"
    offered = [entry["name"] for category in index.json() for entry in category["templates"]]
    assert offered[0] == USO
    assert "sourceRevision" not in index.text
    known = set(client.get("/object_info").json()) | set(EDITOR_NODES)
    for name in offered:
        assert set(templates._node_types(client.get(f"/templates/{name}.json").json())) <= known
    categories = templates.read("index.json")
    everything = {entry["name"] for category in categories for entry in category["templates"]}
    assert 0 < len(offered) < len(everything) / 2
    assert "video_wan2_2_14B_t2v" in everything - set(offered)
    french = client.get("/templates/index.fr.json").json()
    assert {entry["name"] for category in french for entry in category["templates"]} == set(offered)


@pytest.mark.parametrize("name", ["x" * 300 + ".json", "x" * 300 + "-1.webp", "index." + "x" * 300 + ".json"])
def test_there_is_no_template_of_any_name(client: TestClient, name: str) -> None:
    assert client.get(f"/templates/{name}").status_code == 404


def test_the_template_keeps_what_is_edited(client: TestClient) -> None:
    text = client.get(f"/templates/{USO}.json").text
    assert "proxyWidgetErrorQuarantine" not in text
    assert picture.NAME in text  # which is why we draw it under this name


@pytest.mark.parametrize(
    "name", ["none.json", "index.none.json", "none-1.webp", "-1.webp", "..%2F__init__.py", "index.py"]
)
def test_other_files_are_not_there(client: TestClient, name: str) -> None:
    assert client.get(f"/templates/{name}").status_code == 404


def test_templates_have_thumbnails(client: TestClient) -> None:
    first, second = (client.get(f"/templates/{USO}-{number}.webp") for number in (1, 2))
    assert first.headers["content-type"] == "image/webp"
    assert first.content != second.content  # the browser fades from one to the other
    with Image.open(io.BytesIO(first.content)) as thumbnail:
        assert thumbnail.size == (picture.THUMBNAIL, picture.THUMBNAIL)


def test_only_templates_of_our_models_are_offered(client: TestClient) -> None:
    index = client.get("/templates/index.json").json()
    models = [entry["models"] for category in index for entry in category["templates"]]
    assert all(any("FLUX" in model.upper() for model in names) for names in models)


def test_the_picture_is_drawn_once(tmp_path: Path) -> None:
    picture.provide(tmp_path)
    with Image.open(tmp_path / picture.NAME) as drawn:
        assert drawn.size == (768, 768)
        assert len(drawn.getcolors(1 << 20) or []) > 5
    (tmp_path / picture.NAME).write_bytes(b"the user's own")
    picture.provide(tmp_path)
    assert (tmp_path / picture.NAME).read_bytes() == b"the user's own"


def test_the_picture_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, or the server is ended, while it is written."""

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        picture.provide(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_editor(serve: Serve) -> None:
    pytest.importorskip(ui.EDITOR)
    app = FastAPI()
    ui.mount_editor(app)
    with TestClient(app) as client:
        page = client.get("/")
        assert (page.status_code, page.headers["cache-control"]) == (200, "no-cache")
        assert client.get("/materialdesignicons.min.css").headers["content-type"].startswith("text/css")
        assert client.get("/../../usoflow/errors.py").status_code == 404
    scripts = serve().get("/extensions").json()
    assert "/extensions/core/groupNode.js" in scripts


def test_without_the_editor_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "EDITOR", "no_such_package")
    app = FastAPI()
    ui.mount_editor(app)
    with TestClient(app) as client:
        assert "pip install" in client.get("/").text
    assert ui.extensions() == []


def test_no_ui_says_so_and_where_the_api_is_described(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain")
    assert "--no-ui" in page.text
    assert "/docs" in page.text


def test_docs_lists_every_route_and_loads_nothing(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"<script|<link|<img|src=|//", page.text.replace("<!doctype", ""))
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert re.search(rf"<td>{method.upper()}<td><code>{re.escape(path)}</code><td>\w", page.text)
    assert "<td>WebSocket<td><code>/ws</code><td>Send what happens" in page.text
    assert client.get("/redoc").status_code == 404  # as the page that /docs was: from another host


def test_what_the_editor_asks_at_its_start(client: TestClient) -> None:
    answers = {
        path: client.get(path)
        for path in (
            "/api/features", "/api/users", "/api/system_stats", "/api/settings", "/api/i18n",
            "/api/extensions",
            "/api/userdata?dir=workflows&recurse=true&split=false&full_info=true", "/api/userdata/user.css",
            "/api/userdata?dir=subgraphs&recurse=true&split=false&full_info=true", "/user.css",
            "/api/userdata/comfy.templates.json", "/api/global_subgraphs", "/api/workflow_templates",
            "/api/jobs?status=in_progress,pending&limit=200&offset=0", "/api/object_info",
            "/api/jobs?status=completed,failed,cancelled&limit=64&offset=0", "/internal/folder_paths",
            "/api/experiment/models", "/internal/logs/raw",
            "/internal/logs", "/api/node_replacements", "/api/embeddings",
        )
    }  # fmt: skip
    assert {path: answer.status_code for path, answer in answers.items() if answer.status_code != 200} == {}
    assert answers["/api/users"].json() == {"storage": "server", "migrated": True}
    assert answers["/user.css"].headers["content-type"].startswith("text/css")
    assert answers["/api/features"].json()["supports_preview_metadata"] is True
    assert answers["/api/system_stats"].json()["devices"][0]["type"] == "cpu"
    assert client.patch("/internal/logs/subscribe", json={"enabled": True}).status_code == 200


def test_health_and_metrics(client: TestClient) -> None:
    assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
    assert 'usoflow_jobs{state="pending"} 0.0' in client.get("/metrics").text
    server = client.app.state.server  # type: ignore[attr-defined]
    server.engine.broken = "The worker does not start. Why."
    unable = client.get("/health/ready")
    assert (unable.status_code, unable.json()) == (503, {"ready": False, "reason": server.engine.broken})
    server.engine.broken = ""
    server.supervisor.stop()
    assert client.get("/health/ready").status_code == 503


def test_a_server_needs_no_torch(small_models: Path, tmp_path: Path) -> None:
    script = f"""
import sys, json
from pathlib import Path
from fastapi.testclient import TestClient
from usoflow.server.app import assemble
from usoflow.server.context import ServerSettings
from usoflow.service.store import JobStore
from usoflow.service.process import WorkerProcess
from usoflow.service.worker import WorkerSettings
from usoflow.settings import find_folders
folders = find_folders(models=Path({str(small_models)!r}))
settings = ServerSettings(folders=folders, state=Path({str(tmp_path)!r}))
store = JobStore(settings.jobs_file)
engine = WorkerProcess(WorkerSettings(settings.folders, settings.jobs_file))
with TestClient(assemble(settings, store, engine), base_url="http://127.0.0.1:8188") as client:
    nodes = client.get("/api/object_info").json()
print(json.dumps(["KSampler" in nodes, sorted({{"torch", "numpy"}} & sys.modules.keys())]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    known, heavy = json.loads(done.stdout)
    assert known
    assert "torch" not in heavy


def test_the_versions_of_the_editor_and_its_templates(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(ui.EDITOR)
    found = client.get("/system_stats").json()["system"]
    assert found["required_frontend_version"] == version("comfyui-frontend-package")
    for name in ("installed_templates_version", "required_templates_version"):
        assert found[name] == version("comfyui-workflow-templates-json")
    monkeypatch.setitem(system.VERSIONS, "required_frontend_version", "no_such_package")
    system._versions.cache_clear()
    assert "required_frontend_version" not in client.get("/system_stats").json()["system"]
    system._versions.cache_clear()

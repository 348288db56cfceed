"""Programs that nobody here wrote, as their users run them: comfy-cli, the npm SDK, schemathesis.

They are installed into folders of their own from PyPI and npm.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.real_server import RealServer
from small import text_to_image, with_inputs

pytestmark = pytest.mark.full

TOOLS = ("comfy-cli==1.23.0", "schemathesis==4.32.5")
SDK = ("@saintno/comfyui-sdk@0.3.1", "ws@8.23.0")
NODE_SCRIPT = """
import { ComfyApi } from "@saintno/comfyui-sdk";
import fs from "fs";
import WebSocket from "ws";
globalThis.WebSocket ??= WebSocket;
const [address, picture, promptFile] = process.argv.slice(2);
const api = await new ComfyApi(address).init().waitForReady();
const upload = await api.uploadImage(fs.readFileSync(picture), "from-sdk.png");
const done = new Promise(resolve => api.on("executed", event => resolve(event.detail)));
let progress = 0;
api.on("progress", () => progress++);
const job = await api.queuePrompt(0, JSON.parse(fs.readFileSync(promptFile)));
const { prompt_id, output } = await done;
const image = await api.getImage(output.images[0]);
const history = await api.getHistory(job.prompt_id);
console.log(JSON.stringify({ upload: upload.info.filename, own: prompt_id === job.prompt_id, progress,
                             type: image.type, size: image.size, status: history.status.status_str }));
process.exit(0);
"""


@pytest.fixture(scope="module")
def server(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A server without the editor."""
    place = tmp_path_factory.mktemp("foreign")
    (place / "input").mkdir()
    found = RealServer(small_models, place, options=("--no-ui",))
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Python programs are."""
    place = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run([place / "bin" / "pip", "install", "--quiet", *TOOLS], check=True, capture_output=True)
    return place / "bin"


def write_prompt(folder: Path, seed: int) -> Path:
    """A prompt as a file."""
    path = folder / "prompt.json"
    path.write_text(json.dumps(with_inputs(text_to_image(), "sampler", seed=seed)), encoding="utf-8")
    return path


def test_comfy_cli(server: RealServer, tools: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [tools / "comfy", "--skip-prompt", "--no-enable-telemetry", "run", "--workflow",
         write_prompt(tmp_path, 5), "--host", "127.0.0.1", "--port", str(server.port), "--wait"],
        env={**os.environ, "DO_NOT_TRACK": "1", "HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["data"]["status"] == "completed"
    assert set(answer["data"]["executed_node_ids"]) == set(text_to_image())
    assert answer["data"]["outputs"][0].startswith(f"{server.url}/view?filename=out_")


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_npm_sdk(server: RealServer, small_models: Path, tmp_path: Path) -> None:
    subprocess.run(["npm", "install", "--silent", *SDK], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "client.mjs").write_text(NODE_SCRIPT, encoding="utf-8")
    picture = small_models.parent / "input" / "subject.png"
    done = subprocess.run(
        ["node", "client.mjs", server.url, picture, write_prompt(tmp_path, 6)],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1])
    size = answer.pop("size")
    assert size > 1000
    assert answer == {
        "upload": "from-sdk.png", "own": True, "progress": 2, "type": "image/png", "status": "success",
    }  # fmt: skip


def test_no_request_makes_the_server_stumble(server: RealServer, tools: Path) -> None:
    """Requests generated from our own OpenAPI description: never a 5xx."""
    done = subprocess.run(
        [tools / "schemathesis", "run", f"{server.url}/openapi.json", "--url", server.url,
         "--checks", "not_a_server_error", "-n", "20", "--generation-deterministic"],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert server.answers()

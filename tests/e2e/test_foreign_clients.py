"""Programs that nobody here wrote, as users run them: comfy-cli, comfy-script, the npm SDK, schemathesis.

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
from typing import Any

import pytest

from e2e.real_server import RealServer
from small import subject, text_to_image, with_inputs
from usoflow.execution.order import in_order
from usoflow.nodes import registry
from usoflow.workflow.loading import load

pytestmark = pytest.mark.full

TOOLS = ("comfy-cli==1.23.0", "schemathesis==4.32.5", "comfy-script[client]==0.6.1", "tqdm==4.70.1")
PYTHON_SCRIPT = """
import json, sys
from comfy_script.runtime import *
load(sys.argv[1])
import comfy_script.runtime.nodes as nodes
from comfy_script.runtime.nodes import *
open("nodes.txt", "w").write(" ".join(dir(nodes)))
with Workflow(wait=True):
    model, clip, vae = CheckpointLoaderSimple("flux1-dev-fp8.safetensors")
    text = CLIPTextEncode("a cat", clip)
    latent = EmptySD3LatentImage(64, 64, 1)
    latent = KSampler(model, 21, 5, 1.0, "euler", "simple", text, ConditioningZeroOut(text), latent, 1.0)
    saved = SaveImage(VAEDecode(latent, vae), "script")
images = saved.wait()
record = {"files": [entry["filename"] for entry in images._output["images"]], "size": images[0].size}
print(json.dumps(record))
"""
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


def comfy(server: RealServer, tools: Path, home: Path, *arguments: str | Path) -> dict[str, Any]:
    """What `comfy ARGUMENTS` answers, pointed at our server as its documentation says."""
    done = subprocess.run(
        [tools / "comfy", "--skip-prompt", "--no-enable-telemetry", "--json", *arguments],
        env={**os.environ, "DO_NOT_TRACK": "1", "HOME": str(home), "COMFY_LOCAL_URL": server.url},
        cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["ok"] is True
    return dict(answer["data"])


def test_comfy_cli(server: RealServer, tools: Path, tmp_path: Path, small_models: Path) -> None:
    """Upload a picture, run a workflow with it and follow that to its end, download the result."""
    picture = tmp_path / "from-cli.png"
    shutil.copy(small_models.parent / "input" / "subject.png", picture)
    uploaded = comfy(server, tools, tmp_path, "upload", picture)["uploads"][0]
    assert (server.place / "input" / uploaded["cloud_name"]).read_bytes() == picture.read_bytes()

    prompt = with_inputs(with_inputs(subject(), "sampler", seed=5), "picture", image=uploaded["cloud_name"])
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(prompt), encoding="utf-8")
    ran = comfy(server, tools, tmp_path, "run", "--workflow", file, "--wait")
    assert ran["status"] == "completed"
    assert set(ran["executed_node_ids"]) == set(prompt)
    assert ran["outputs"][0].startswith(f"{server.url}/view?filename=out_")

    job = ran["prompt_id"]
    assert comfy(server, tools, tmp_path, "jobs", "status", job)["status"] == "completed"
    (fetched,) = comfy(server, tools, tmp_path, "download", job, "--out-dir", "got", "--where", "local")[
        "files"
    ]
    saved = server.place / "output" / server.get(f"/jobs/{job}")["preview_output"]["filename"]
    assert Path(fetched["path"]).read_bytes() == saved.read_bytes()


def test_comfy_cli_converts_the_template(server: RealServer, tools: Path, tmp_path: Path) -> None:
    """It makes a prompt of the UI graph by our /object_info: what the picture needs, it sees as we do."""
    template = Path(__file__).parents[1] / "pairs" / "uso_template.ui.json"
    made = comfy(server, tools, tmp_path, "run", "--workflow", template, "--print-prompt")["prompt"]
    ours = load(template, registry()).prompt
    needed = list(in_order(ours, ["9"]))
    assert len(needed) > 10
    for key in needed:
        assert made[key]["class_type"] == ours.nodes[key].class_type
        assert made[key]["inputs"] == ours.nodes[key].inputs


def test_comfy_script(server: RealServer, tools: Path, tmp_path: Path) -> None:
    """A Python program over the nodes that our server describes; previews while it waits."""
    script = tmp_path / "script.py"
    script.write_text(PYTHON_SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [tools / "python", script, server.url], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "HOME": str(tmp_path)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Failed" not in done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == {"files": ["script_00001_.png"], "size": [64, 64]}
    assert "KSampler" in (tmp_path / "nodes.txt").read_text(encoding="utf-8")


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

"""`usoflow serve --custom-nodes`: real processes, nodes that work and nodes that kill their process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from e2e.real_server import RealServer
from shell import usoflow
from small import text_to_image

EXAMPLES = Path(__file__).parents[1] / "custom_nodes"


@pytest.fixture(scope="module")
def server(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A server with the examples, and a file that needs what there is not."""
    place = tmp_path_factory.mktemp("custom")
    (place / "input").mkdir()
    shutil.copytree(EXAMPLES, place / "nodes", ignore=shutil.ignore_patterns("__pycache__"))
    (place / "nodes" / "incomplete.py").write_text("import a_library_that_is_missing", encoding="utf-8")
    found = RealServer(small_models, place, options=("--no-ui", "--custom-nodes", str(place / "nodes")))
    found.start()
    yield found
    found.stop()


def brighter(factor: float = 2.0) -> dict[str, Any]:
    """A picture, made brighter by a custom node."""
    node = {
        "class_type": "Brightness",
        "inputs": {"image": ["decode", 0], "factor": factor, "mode": "multiply"},
    }
    prompt = text_to_image() | {"bright": node}
    prompt["save"]["inputs"] |= {"images": ["bright", 0], "filename_prefix": f"bright{factor}"}
    prompt["plain"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["decode", 0], "filename_prefix": "plain"},
    }
    return prompt


def alone(class_type: str) -> dict[str, Any]:
    """One node, and the output that needs it."""
    return {
        "bad": {"class_type": class_type, "inputs": {}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["bad", 0], "filename_prefix": "bad"}},
    }


def test_the_server_knows_them_and_names_what_is_missing(server: RealServer) -> None:
    info = server.get("/api/object_info")
    assert {"KSampler", "Brightness", "ShowNumber", "Segfault"} <= set(info)
    assert info["Brightness"]["python_module"] == "custom_nodes.brightness"
    log = (server.place / "log").read_text(encoding="utf-8")
    assert "incomplete.py: it needs the module 'a_library_that_is_missing', which is not installed" in log


def test_a_workflow_with_one(server: RealServer) -> None:
    job = server.ended(server.submit(brighter()))
    assert job["status"] == "completed"
    pixels = {}
    for node in ("save", "plain"):
        name = job["outputs"][node]["images"][0]["filename"]
        with Image.open(server.place / "output" / name) as picture:
            pixels[node] = picture.tobytes()
    expected = [min(255, 2 * value) for value in pixels["plain"]]
    assert max(abs(a - b) for a, b in zip(pixels["save"], expected, strict=True)) <= 2  # rounding


def test_its_limits_are_checked_by_the_server(server: RealServer) -> None:
    prompt = {key: node for key, node in brighter(9.0).items() if key != "plain"}
    answer = httpx.post(f"{server.url}/prompt", json={"prompt": prompt}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["node_errors"]["bright"]["errors"][0]["type"] == "value_bigger_than_max"


@pytest.mark.parametrize(
    ("class_type", "kind", "words"),
    [
        ("Segfault", "worker_died", "segmentation fault"),
        ("NoMemoryLeft", "out_of_memory", "NoMemoryLeft (node bad)"),
        ("DiesOfTheLimit", "worker_died", "segmentation fault"),
        ("Raises", "custom_node_failed", "what the author says"),
    ],
)
def test_what_kills_the_worker_costs_one_job(
    server: RealServer, class_type: str, kind: str, words: str
) -> None:
    error = server.ended(server.submit(alone(class_type)))["execution_error"]
    assert (error["exception_type"], error["node_id"], error["node_type"]) == (kind, "bad", class_type)
    assert words in error["exception_message"]
    assert server.ended(server.submit(text_to_image()))["status"] == "completed"


def test_on_the_command_line(server: RealServer, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(httpx.Response(200, json=brighter()).text, encoding="utf-8")
    options = ("--models", server.models, "--output", tmp_path, "--device", "cpu", "--dtype", "fp32")
    done = usoflow("run", prompt, *options, "--custom-nodes", EXAMPLES)
    assert done.code == 0, done.err
    assert (tmp_path / "bright2.0_00001_.png").is_file()
    refused = usoflow("run", prompt, *options)
    assert refused.code == 3
    assert "Brightness does not exist" in refused.err

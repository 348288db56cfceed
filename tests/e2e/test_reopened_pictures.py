"""Pictures of `usoflow generate` and `usoflow run --set`, dragged into the official editor.

What the editor would send is what was run. Needs Debian's chromium.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.real_server import RealServer
from shell import usoflow
from usoflow.workflow import metadata

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]
DROP = "bytes => app.handleFile(new File([new Uint8Array(bytes)], 'made.png', {type: 'image/png'}))"
SENT = "async () => (await app.graphToPrompt()).output"
ENTER = "id => app.canvas.setGraph(app.graph.getNodeById(id).subgraph)"
FIT = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
SMALL = ("--size=32x32", "--steps=1", "--seed=7")
SMALL_SUBJECT = (*SMALL, "--subject-size=32")


@pytest.fixture(scope="module")
def server(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    place = tmp_path_factory.mktemp("reopened")
    (place / "input").mkdir()
    found = RealServer(small_models, place)
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def page(server: RealServer) -> Iterator[Any]:
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(f"{server.url}/?template=flux1_dev_uso_reference_image_gen")  # else it shows a dialogue
        page.wait_for_function("window.app && app.graph?.nodes?.length >= 8", timeout=60_000)
        yield page
        browser.close()


def commands(folder: Path) -> dict[str, list[str]]:
    subject, style = str(folder / "subject.png"), str(folder / "style.png")
    return {
        "text": ["generate", "a cat", *SMALL],
        "subject": ["generate", "a cat", "--subject", subject, "--keep-size", *SMALL_SUBJECT],
        "subjects": [
            "generate", "a cat", "--subject", subject, style, subject, "--guidance=2", *SMALL_SUBJECT,
        ],
        "style": ["generate", "a cat", "--style", style, "--guidance=2", "--easycache", *SMALL],
        "styles": ["generate", "a cat", "--style", style, subject, style, subject, *SMALL],
        "all": [
            "generate", "", "--subject", subject, style, "--style", style, subject, style,
            "--easycache", "0.3", "--lora", "uso-flux1-dit-lora-v1.safetensors:-0.5", *SMALL_SUBJECT,
        ],
        "set": [
            "run", "template:flux1_dev_uso_reference_image_gen", "--image", f"47={subject}", "--seed=9",
            "--set", "112:6.text=a {cat}", "--set", "112:110.width=64", "--set", "112:110.height=32",
            "--set", "112:31.steps=1", "--set", "112:109.largest_size=48",
            "--set", "112:43.strength_model=0.5", "--set", "112:57:35.guidance=2.5",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["text", "subject", "subjects", "style", "styles", "all", "set"])
def test_the_editor_would_send_what_was_run(page: Any, small_models: Path, tmp_path: Path, name: str) -> None:
    options = ["--models", str(small_models), "--output", str(tmp_path), "--device=cpu", "--dtype=fp32"]
    done = usoflow(*commands(small_models.parent / "input")[name], *options, "--json")
    assert done.code == 0, done.err
    data = Path(json.loads(done.out)["images"][0]).read_bytes()
    page.evaluate("app.graph.clear()")
    page.evaluate(DROP, list(data))
    page.wait_for_function("app.graph.nodes.length >= 8")
    sent, run = page.evaluate(SENT), json.loads(metadata.read(data)["prompt"])
    assert inputs(sent) == inputs(run)
    if folder := os.environ.get("USOFLOW_SCREENSHOTS"):
        page.evaluate(ENTER, 113 if name in ("text", "style", "styles") else 112)
        page.evaluate(FIT)
        page.wait_for_timeout(1500)
        page.screenshot(path=f"{folder}/reopened-{name}.png")


def inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}

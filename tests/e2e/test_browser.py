"""The tutorial in a real browser: the official editor on our server, with untrained models.

Needs Debian's chromium. Screenshots stay in the folder that USOFLOW_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from e2e.real_server import RealServer, until

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]

TEMPLATE = "flux1_dev_uso_reference_image_gen"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PREVIEW = 4  # binary event: picture with metadata
SMALL = """steps => {
  const graphs = [app.graph, ...app.graph.subgraphs.values()]
  for (const graph of graphs) for (const node of graph.nodes) for (const widget of node.widgets || []) {
    if (['width', 'height', 'largest_size'].includes(widget.name)) widget.value = 64
    if (widget.name === 'steps') widget.value = steps
  }
}"""
SEED = """seed => {
  const widgets = app.graph.nodes.flatMap(node => node.widgets || [])
  for (const widget of widgets.filter(widget => widget.name === 'seed')) widget.value = seed
}"""
SELECT = """([ids, inside]) => {
  app.canvas.setGraph(inside ? app.graph.getNodeById(inside).subgraph : app.graph)
  app.canvas.selectNodes(ids.map(id => app.canvas.graph.getNodeById(id)))
  app.canvas.canvas.focus()
}"""


@dataclass
class Editor:
    """The page, and what went over its socket."""

    page: Any
    server: RealServer
    complaints: list[str] = field(default_factory=list)
    nodes: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    previews: int = 0

    def open(self, query: str = "") -> None:
        """Open the editor and wait for its graph."""
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._note))
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{self.server.url}/{query}")
        self.page.wait_for_function("window.app && app.graph && app.graph.nodes", timeout=60_000)

    def open_template(self) -> None:
        """Open the USO template, small."""
        self.open(f"?template={TEMPLATE}")
        self.page.wait_for_function("app.graph.nodes.length >= 8", timeout=60_000)
        self.page.wait_for_timeout(1000)
        self.small()

    def small(self, steps: int = 2) -> None:
        """Set sizes and steps that the models do quickly."""
        self.page.evaluate(SMALL, steps)

    def bypass(self, ids: Sequence[int], inside: int | None = None) -> None:
        """Select nodes and press Ctrl+B."""
        self.page.evaluate(SELECT, [list(ids), inside])
        self.page.keyboard.press("Control+b")
        self.page.evaluate(SELECT, [[], None])

    def run(self) -> dict[str, Any]:
        """Press Ctrl+Enter; the job when it is over. Nothing comes from the cache, so that all is seen."""
        self.page.request.post(f"{self.server.url}/free", data={"free_memory": True})
        return self.server.ended(self.submit())

    def submit(self) -> str:
        """Press Ctrl+Enter; the id of the job."""
        before = {job["id"] for job in self.server.get("/jobs")["jobs"]}
        self.page.keyboard.press("Control+Enter")
        while not (new := {job["id"] for job in self.server.get("/jobs")["jobs"]} - before):
            self.page.wait_for_timeout(50)
        return new.pop()

    def screenshot(self, name: str) -> None:
        """Keep what is seen, if somebody wants it."""
        if folder := os.environ.get("USOFLOW_SCREENSHOTS"):
            self.page.screenshot(path=f"{folder}/{name}.png")

    def _listen(self, message: Any) -> None:
        url = (message.location or {}).get("url", "")
        if message.type == "error" and url.startswith(self.server.url):
            self.complaints.append(f"{message.text} {url}")

    def _note(self, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            self.previews += struct.unpack(">I", frame[:4])[0] == PREVIEW
            return
        message = json.loads(frame)
        job = message["data"].get("prompt_id")
        if message["type"] == "executing" and message["data"]["node"]:
            self.nodes[job].add(message["data"]["node"])
        elif message["type"] == "execution_cached":
            self.nodes[job] |= set(message["data"]["nodes"])


@pytest.fixture(scope="module")
def server(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A server with the editor."""
    place = tmp_path_factory.mktemp("browser")
    (place / "input").mkdir()
    found = RealServer(small_models, place)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def editor(server: RealServer) -> Iterator[Editor]:
    """A fresh browser at the editor; at the end nothing of ours was complained about."""
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        found = Editor(browser.new_page(viewport={"width": 1600, "height": 1000}), server)
        yield found
        browser.close()
    assert found.complaints == []


def picture(server: RealServer, job: dict[str, Any]) -> Path:
    """What SaveImage of a job saved."""
    return server.place / "output" / job["outputs"]["9"]["images"][0]["filename"]


def pixels(path: Path) -> tuple[tuple[int, int], bytes]:
    """Size and colours."""
    with Image.open(path) as found:
        return found.size, found.tobytes()


def test_the_tutorial(editor: Editor, small_models: Path) -> None:
    """Template, upload, run, previews, picture, history."""
    editor.open_template()
    warnings = editor.page.locator(".p-toast-message").all_inner_texts()
    assert warnings == []
    editor.screenshot("template")
    with editor.page.expect_file_chooser() as chooser:
        editor.page.evaluate("app.graph.getNodeById(47).widgets.find(w => w.name === 'upload').callback()")
    chooser.value.set_files(small_models.parent / "input" / "subject.png")
    editor.page.wait_for_function("app.graph.getNodeById(47).widgets[0].value === 'subject.png'")
    editor.small(steps=8)
    job = editor.run()
    assert job["status"] == "completed"
    assert pixels(picture(editor.server, job))[0] == (64, 64)
    editor.page.wait_for_function("app.graph.getNodeById(9).imgs?.length > 0")  # it is shown
    assert editor.previews > 0
    assert editor.page.locator(".p-toast-message").all_inner_texts() == []
    editor.page.get_by_text("Assets", exact=True).first.click()
    editor.page.wait_for_selector(f"img[src*='{job['outputs']['9']['images'][0]['filename']}']")
    editor.screenshot("tutorial")


def test_four_variations_by_ctrl_b(editor: Editor) -> None:
    """Each runs other nodes and gives another picture."""
    editor.open_template()
    editor.page.evaluate(SEED, 1)
    style_inside = [46, 53, 55, 56]
    found = {"subject": editor.run()}
    editor.bypass(style_inside, inside=112)
    found["both"] = editor.run()
    editor.bypass([57, 51, 109], inside=112)
    found["style"] = editor.run()
    editor.bypass(style_inside, inside=112)
    found["text"] = editor.run()
    editor.screenshot("variations")
    assert {name: job["status"] for name, job in found.items()} == dict.fromkeys(found, "completed")
    sets = {name: frozenset(editor.nodes[job["id"]]) for name, job in found.items()}
    assert len(set(sets.values())) == 4
    types = {
        name: {job["workflow"]["prompt"][n]["class_type"] for n in sets[name]} for name, job in found.items()
    }
    assert {name for name in types if "ReferenceLatent" in types[name]} == {"subject", "both"}
    assert {name for name in types if "USOStyleReference" in types[name]} == {"both", "style"}
    assert len({pixels(picture(editor.server, job)) for job in found.values()}) == 4


def test_a_picture_dragged_in_is_its_workflow(editor: Editor) -> None:
    editor.open_template()
    made = picture(editor.server, editor.run())
    editor.page.evaluate("app.graph.clear()")
    editor.page.evaluate(
        """bytes => app.handleFile(new File([new Uint8Array(bytes)], 'made.png', {type: 'image/png'}))""",
        list(made.read_bytes()),
    )
    editor.page.wait_for_function("app.graph.nodes.length >= 8")
    width = editor.page.evaluate("app.graph.getNodeById(112).widgets.find(w => w.name === 'width').value")
    assert width == 64  # as edited, not as the template has it


def test_an_error_is_shown_at_its_node(editor: Editor) -> None:
    editor.open_template()
    editor.page.evaluate("app.graph.getNodeById(47).widgets[0].value = 'none.png'")
    editor.page.keyboard.press("Control+Enter")
    editor.page.wait_for_function("app.lastNodeErrors && Object.keys(app.lastNodeErrors).length > 0")
    assert list(editor.page.evaluate("app.lastNodeErrors")) == ["47"]
    editor.screenshot("validation")
    refused = ("400 (Bad Request)", "PromptExecutionError")  # the editor reports what it was told
    editor.complaints = [line for line in editor.complaints if not any(word in line for word in refused)]


def test_cancel_and_a_killed_worker(editor: Editor) -> None:
    editor.open_template()
    editor.small(steps=10_000)
    job = editor.submit()
    until(lambda: "112:31" in editor.nodes[job] or editor.page.wait_for_timeout(50))
    editor.page.evaluate("fetch('/api/interrupt', {method: 'POST'})")
    assert editor.server.ended(job)["status"] == "cancelled"
    editor.page.evaluate(SEED, 77)
    job = editor.submit()
    until(lambda: "112:31" in editor.nodes[job] or editor.page.wait_for_timeout(50))
    assert editor.server.kill_worker()
    assert editor.server.ended(job)["execution_error"]["exception_type"] in ("worker_died", "out_of_memory")
    editor.page.get_by_role("button", name="View details").or_(
        editor.page.get_by_text("Show report")
    ).first.click()
    editor.page.wait_for_timeout(1000)
    editor.screenshot("killed")
    assert "The worker process ended" in editor.page.evaluate("document.body.innerText")
    editor.small(steps=2)
    assert editor.run()["status"] == "completed"

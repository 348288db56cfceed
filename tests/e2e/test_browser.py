"""The tutorial in a real browser: the official editor on our server, with untrained models.

Needs Debian's chromium. Screenshots stay in `out/screenshots`.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from e2e.real_server import PATIENCE, RealServer, until
from usoflow.server.picture import THUMBNAIL
from usoflow.settings import POCKET_MODELS

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]

SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"
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
# Where a widget of a node, or a group of a subgraph, is on the page: [left, top, right, bottom].
WIDGET = """([id, name]) => {
  const node = app.graph.getNodeById(id), widget = node.widgets.find(widget => widget.name === name)
  const [x, y] = [node.pos[0], node.pos[1] + widget.last_y]
  return app.canvas.ds.convertOffsetToCanvas([x, y]).concat(
    app.canvas.ds.convertOffsetToCanvas([x + node.size[0], y + 20]))
}"""
GROUP = """([id, title]) => {
  app.canvas.setGraph(app.graph.getNodeById(id).subgraph)
  const group = app.canvas.graph.groups.find(group => group.title.includes(title))
  const [x, y, width, height] = group._bounding
  app.canvas.ds.scale = 0.5
  app.canvas.ds.offset[0] = 600 - x
  app.canvas.ds.offset[1] = 600 - y
  app.canvas.setDirty(true, true)
  app.canvas.canvas.focus()
  return app.canvas.ds.convertOffsetToCanvas([x, y]).concat(
    app.canvas.ds.convertOffsetToCanvas([x + width, y + height]))
}"""
LORAS = """() => {
  const nodes = [...app.graph.subgraphs.values()].flatMap(graph => graph.nodes)
  return nodes.find(node => node.type === 'LoraLoaderModelOnly').widgets[0].options.values
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
        """Open the USO template; small."""
        self.choose_template()
        self.small()

    def choose_template(self) -> None:
        """Open the USO template from the template browser, which a browser's first visit shows by itself."""
        self.open()
        self.page.get_by_test_id(f"template-workflow-{TEMPLATE}").click()
        self.page.wait_for_function("app.graph.nodes.length >= 8", timeout=60_000)
        self.page.wait_for_timeout(1000)

    def upload(self, file: Path) -> None:
        """Give the subject's LoadImage a picture by its button.

        The editor shows name and picture before the server has the file, and refuses to run until it has.
        """
        with self.page.expect_file_chooser() as chooser:
            self.click(self.page.evaluate(WIDGET, [47, "upload"]))
        with self.page.expect_response("**/upload/image"):
            chooser.value.set_files(file)
        self.page.wait_for_function(
            "name => app.graph.getNodeById(47).widgets[0].value === name", arg=file.name
        )

    def click(self, box: Sequence[float]) -> None:
        """Click in the middle of a part of the canvas."""
        left, top, right, bottom = box
        self.page.mouse.click((left + right) / 2, (top + bottom) / 2)

    def drop(self, file: Path) -> None:
        """Drag a file in from the desktop."""
        self.page.evaluate("app.graph.clear()")
        session = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": 800, "y": 500, "data": data})
        self.page.wait_for_function("app.graph.nodes.length >= 8", timeout=30_000)

    def toasts(self) -> list[str]:
        """What pops up, but for how the job goes on."""
        texts = self.page.locator("[role=alert], [role=status]").all_inner_texts()
        return [text for text in texts if text.strip() and not re.match(r"Job |Notification", text.strip())]

    def small(self, steps: int = 2) -> None:
        """Set sizes and steps that the models do quickly."""
        self.page.evaluate(SMALL, steps)

    def bypass(self, ids: Sequence[int], inside: int) -> None:
        """Select nodes of a subgraph and press Ctrl+B."""
        self.page.evaluate(SELECT, [list(ids), inside])
        self._press_and_leave()

    def bypass_group(self, title: str, inside: int, *, times: int = 1) -> None:
        """Draw a frame around a group with Ctrl and the mouse, as for several nodes, and press Ctrl+B.

        A group that is off but for a note in it needs two presses: the first turns the note off as well.
        """
        left, top, right, bottom = self.page.evaluate(GROUP, [inside, title])
        self.page.wait_for_timeout(300)
        mouse = self.page.mouse
        self.page.keyboard.down("Control")
        mouse.move(left - 8, top - 8)
        mouse.down()
        mouse.move((left + right) / 2, (top + bottom) / 2, steps=5)
        mouse.move(right + 8, bottom + 8, steps=5)
        mouse.up()
        self.page.keyboard.up("Control")
        self._press_and_leave(times)

    def _press_and_leave(self, times: int = 1) -> None:
        for _ in range(times):
            self.page.keyboard.press("Control+b")
        self.page.evaluate(SELECT, [[], None])

    def run(self) -> dict[str, Any]:
        """Press Ctrl+Enter; the job when it is over. Nothing comes from the cache, so that all is seen."""
        self.page.request.post(f"{self.server.url}/free", data={"free_memory": True})
        job = self.server.ended(self.submit())
        self.page.wait_for_timeout(300)  # for what the socket has brought meanwhile
        return job

    def submit(self) -> str:
        """Press Ctrl+Enter; the id of the job."""
        before = self._jobs()
        self.page.keyboard.press("Control+Enter")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if new := self._jobs() - before:
                return new.pop()
            self.page.wait_for_timeout(50)
        self.screenshot("nothing-submitted")
        complaints = "; ".join(self.complaints) or "the page complained of nothing"
        raise AssertionError(
            f"Ctrl+Enter submitted nothing (out/screenshots/nothing-submitted.png): {complaints}"
        )

    def _jobs(self) -> set[str]:
        return {job["id"] for job in self.server.get("/jobs")["jobs"]}

    def screenshot(self, name: str) -> None:
        """Keep what is seen."""
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")

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
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    place = tmp_path_factory.mktemp("browser")
    (place / "input").mkdir()
    found = RealServer(small_models, place)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def editor(server: RealServer) -> Iterator[Editor]:
    """A fresh browser at the editor; at the end nothing of ours was complained about."""
    with browser_at(server) as found:
        yield found


@contextmanager
def browser_at(server: RealServer) -> Iterator[Editor]:
    """A browser for a server; at the end nothing of ours was complained about."""
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
    assert editor.toasts() == []
    assert editor.page.locator("[role=dialog]").count() == 0  # nothing is missing
    editor.screenshot("1-template")
    editor.upload(small_models.parent / "input" / "subject.png")
    editor.small(steps=8)
    job = editor.run()
    assert job["status"] == "completed"
    assert pixels(picture(editor.server, job))[0] == (64, 64)
    editor.page.wait_for_function("app.graph.getNodeById(9).imgs?.length > 0")  # it is shown
    assert editor.previews > 0
    assert editor.toasts() == []
    name = job["outputs"]["9"]["images"][0]["filename"]
    editor.page.get_by_test_id("queue-overlay-toggle").click()
    editor.page.get_by_text(name).first.wait_for()  # the queue's history
    editor.screenshot("2-queue")
    editor.page.get_by_text("Assets", exact=True).first.click()
    editor.page.wait_for_selector(f"img[src*='{name}']")
    editor.page.wait_for_load_state("networkidle")
    editor.screenshot("3-history")


def test_the_template_runs_with_the_models_that_we_ship(tmp_path: Path) -> None:
    """Template, upload, run: who has no other models changes no name and no size."""
    (tmp_path / "input").mkdir()
    server = RealServer(POCKET_MODELS, tmp_path)
    server.start()
    try:
        with browser_at(server) as editor:
            editor.choose_template()
            editor.upload(Path(__file__).parents[2] / "examples" / "robot.png")
            job = editor.run()
            assert (job["status"], editor.toasts()) == ("completed", [])
            assert pixels(picture(server, job))[0] == (128, 128)
            editor.screenshot("5-pocket")
    finally:
        server.stop()


def test_the_first_visit_offers_the_templates(server: RealServer, editor: Editor) -> None:
    """USO's first, each with a picture; also where another browser has been here."""
    server.set("Comfy.TutorialCompleted", True)
    editor.open()
    card = editor.page.get_by_test_id(f"template-workflow-{TEMPLATE}")
    card.wait_for()
    cards = editor.page.locator("[data-testid^=template-workflow-]")
    assert cards.first.get_attribute("data-testid") == f"template-workflow-{TEMPLATE}"
    editor.page.wait_for_load_state("networkidle")
    shown = card.locator("img").first.evaluate("image => image.complete && image.naturalWidth")
    assert shown == THUMBNAIL
    editor.screenshot("0-first-visit")


def test_four_variations_by_ctrl_b(editor: Editor) -> None:
    """Each runs other nodes and gives another picture."""
    editor.open_template()
    editor.page.evaluate(SEED, 1)
    subject_nodes = [57, 51, 109]
    found = {"subject": editor.run()}
    editor.bypass_group("Style Reference", inside=112, times=2)
    found["both"] = editor.run()
    editor.bypass(subject_nodes, inside=112)
    found["style"] = editor.run()
    editor.bypass_group("Style Reference", inside=112)
    found["text"] = editor.run()
    assert {name: job["status"] for name, job in found.items()} == dict.fromkeys(found, "completed")
    sets = {name: frozenset(editor.nodes[job["id"]]) for name, job in found.items()}
    assert len(set(sets.values())) == 4
    types = {
        name: {job["workflow"]["prompt"][n]["class_type"] for n in sets[name]} for name, job in found.items()
    }
    assert {name for name in types if "ReferenceLatent" in types[name]} == {"subject", "both"}
    assert {name for name in types if "USOStyleReference" in types[name]} == {"both", "style"}
    assert len({pixels(picture(editor.server, job)) for job in found.values()}) == 4
    assert editor.toasts() == []
    editor.page.evaluate(GROUP, [112, "Style Reference"])
    editor.page.wait_for_timeout(500)
    editor.screenshot("4-groups")


def test_a_picture_dragged_in_is_its_workflow(editor: Editor) -> None:
    editor.open_template()
    first = editor.run()
    editor.drop(picture(editor.server, first))
    width = editor.page.evaluate("app.graph.getNodeById(112).widgets.find(w => w.name === 'width').value")
    assert width == 64  # as edited, not as the template has it
    again = editor.run()
    assert again["workflow"]["prompt"] == first["workflow"]["prompt"]
    assert pixels(picture(editor.server, again)) == pixels(picture(editor.server, first))
    assert editor.toasts() == []


@pytest.mark.shared
@pytest.mark.parametrize("name", ["example1", "example2", "example3"])
def test_the_tutorials_own_picture_dragged_in(
    editor: Editor, shared: Path, small_models: Path, name: str
) -> None:
    """Those that ComfyUI made: the graph of the tutorial, and it runs."""
    example = shared / "assets" / "examples" / f"{name}.png"
    with Image.open(example) as made:
        wanted = json.loads(made.info["workflow"])
    for node in wanted["nodes"] + [n for s in wanted["definitions"]["subgraphs"] for n in s["nodes"]]:
        if node["type"] == "LoadImage":
            shutil.copy(
                small_models.parent / "input" / "subject.png",
                editor.server.place / "input" / node["widgets_values"][0],
            )
    editor.open()
    editor.page.wait_for_timeout(2000)
    editor.page.keyboard.press("Escape")
    editor.drop(example)
    editor.page.wait_for_timeout(1000)
    assert editor.page.evaluate("app.graph.nodes.length") == len(wanted["nodes"])
    editor.small()
    editor.screenshot(f"5-{name}")
    job = editor.run()
    assert job["status"] == "completed"
    assert editor.toasts() == []


def test_a_model_dropped_in_is_there_after_r(editor: Editor, small_models: Path) -> None:
    editor.open_template()
    assert "new.safetensors" not in editor.page.evaluate(LORAS)
    added = small_models / "loras" / "new.safetensors"
    shutil.copy(next((small_models / "loras").iterdir()), added)
    try:
        editor.page.evaluate("app.canvas.canvas.focus()")
        editor.page.keyboard.press("r")
        editor.page.wait_for_function(f"({LORAS})().includes('new.safetensors')")
    finally:
        added.unlink()


def test_an_error_is_shown_at_its_node(editor: Editor) -> None:
    editor.open_template()
    editor.page.evaluate("app.graph.getNodeById(47).widgets[0].value = 'none.png'")
    editor.page.keyboard.press("Control+Enter")
    editor.page.wait_for_function("app.lastNodeErrors && Object.keys(app.lastNodeErrors).length > 0")
    assert list(editor.page.evaluate("app.lastNodeErrors")) == ["47"]
    assert editor.page.evaluate("app.graph.nodes.filter(n => n.has_errors).map(n => String(n.id))") == ["47"]
    assert any("Input image couldn't be loaded" in toast for toast in editor.toasts())
    editor.screenshot("6-validation")
    refused = ("400 (Bad Request)", "PromptExecutionError")  # the editor reports what it was told
    editor.complaints = [line for line in editor.complaints if not any(word in line for word in refused)]


def test_cancel_and_a_killed_worker(editor: Editor) -> None:
    editor.open_template()
    editor.small(steps=10_000)
    job = editor.submit()
    until(lambda: "112:31" in editor.nodes[job] or editor.page.wait_for_timeout(50))
    editor.page.wait_for_timeout(1000)
    editor.screenshot("7-running")
    editor.page.get_by_role("button", name="Cancel current run").click()
    assert editor.server.ended(job)["status"] == "cancelled"
    assert all("interrupted" in toast for toast in editor.toasts())  # which goes away by itself
    editor.page.evaluate(SEED, 77)
    job = editor.submit()
    until(lambda: "112:31" in editor.nodes[job] or editor.page.wait_for_timeout(50))
    assert editor.server.kill_worker()
    assert editor.server.ended(job)["execution_error"]["exception_type"] in ("worker_died", "out_of_memory")
    editor.page.get_by_role("button", name="View details").or_(
        editor.page.get_by_text("Show report")
    ).first.click()
    editor.page.wait_for_timeout(1000)
    assert "The worker process ended" in editor.page.evaluate("document.body.innerText")
    editor.page.get_by_text("Console", exact=True).first.click()
    editor.page.get_by_text(f"Job {job} failed after").first.wait_for()
    editor.screenshot("8-killed")
    editor.small(steps=2)
    assert editor.run()["status"] == "completed"

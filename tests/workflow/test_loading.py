"""Files of every kind, and of none."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reference_nodes import registry
from usoflow.errors import UsoflowError
from usoflow.workflow import metadata
from usoflow.workflow.loading import load, load_bytes, load_json, read_json, template
from webp import webp_exif

PAIRS = Path(__file__).parents[1] / "pairs"
EXAMPLES = Path(__file__).parents[3] / "shared" / "assets" / "examples"
TEMPLATE = "flux1_dev_uso_reference_image_gen"
QUARANTINE = "proxyWidgetErrorQuarantine"


def pair(name: str) -> tuple[Any, Any]:
    return tuple(json.loads((PAIRS / f"{name}.{kind}.json").read_text()) for kind in ("ui", "api"))  # type: ignore


def plain(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


@pytest.mark.parametrize("kind", ["ui", "api"])
def test_json_file(kind: str) -> None:
    loaded = load(PAIRS / f"uso_style_on.{kind}.json", registry())
    assert plain(loaded.prompt.to_json()) == plain(pair("uso_style_on")[1])
    assert (loaded.workflow is None) == (kind == "api")


def test_template() -> None:
    loaded = load(f"template:{TEMPLATE}", registry())
    assert plain(loaded.prompt.to_json()) == plain(pair("uso_template")[1])
    assert loaded.workflow is not None
    assert QUARANTINE not in json.dumps(loaded.workflow)
    assert loaded.warnings == ()


def test_every_official_template_converts() -> None:
    from importlib import resources

    folder = resources.files("comfyui_workflow_templates_json") / "templates"
    names = [file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")]
    workflows = [name for name in names if not name.startswith("index") and name != "fuse_options"]
    assert len(workflows) > 100
    for name in workflows:
        assert load_json(template(name), registry()).prompt.nodes


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "videos"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"\x1aE\xdf\xa3", "videos"),
    ],
)
def test_other_files_are_named(start: bytes, words: str) -> None:
    with pytest.raises(UsoflowError, match=words) as error:
        load_bytes(start + bytes(50), registry())
    assert error.value.code == "not_a_workflow"


def test_a_model_given_by_mistake_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "flux.safetensors").open("wb") as file:
        file.truncate(17_200_000_000)  # a hole: nothing is on the disk
    with pytest.raises(UsoflowError, match=r"has 17\.2 GB, more than any workflow"):
        load(tmp_path / "flux.safetensors", registry())


@pytest.mark.parametrize("name", ["nothing", "../templates/index", "index", "", "/etc/passwd", "a\0b"])
def test_unknown_template(name: str) -> None:
    with pytest.raises(UsoflowError) as raised:
        load(f"template:{name}", registry())
    assert raised.value.code == "template_unknown"


def picture(prompt: Any, extra: dict[str, Any], format: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (4, 4))
    if format == "PNG":
        image.save(buffer, format, pnginfo=metadata.png_info(prompt, extra))
    else:
        image.save(buffer, format, exif=webp_exif(prompt, extra))
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_picture(format: str, tmp_path: Path) -> None:
    workflow, prompt = pair("t_seed_control")
    file = tmp_path / "any.name"  # content decides
    file.write_bytes(picture(prompt, {"workflow": workflow}, format))
    loaded = load(file, registry())
    assert plain(loaded.prompt.to_json()) == plain(prompt)
    assert loaded.workflow == workflow


def test_a_pictures_workflow_opens_as_it_was_edited() -> None:
    workflow, prompt = pair("t_seed_control")
    workflow["nodes"][0].setdefault("properties", {})["proxyWidgetErrorQuarantine"] = [{}]
    body = {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
    in_picture = load_bytes(picture(prompt, {"workflow": workflow}, "PNG"), registry())
    for loaded in (in_picture, load_json(body, registry())):
        assert loaded.workflow is not None
        assert "proxyWidgetErrorQuarantine" not in loaded.workflow["nodes"][0]["properties"]


def test_a_picture_without_usable_prompt() -> None:
    workflow, prompt = pair("t_seed_control")
    loaded = load_bytes(picture("just a text", {"workflow": workflow}, "PNG"), registry())
    assert plain(loaded.prompt.to_json()) == plain(prompt)


def test_request_body() -> None:
    workflow, prompt = pair("t_seed_control")
    body = {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
    loaded = load_json(body, registry())
    assert plain(loaded.prompt.to_json()) == plain(prompt)
    assert loaded.workflow == workflow
    assert load_json({"prompt": prompt}, registry()).workflow is None


def test_a_node_called_prompt_is_no_request() -> None:
    graph = {"prompt": {"class_type": "LoadImage", "inputs": {"image": "a"}}}
    assert list(load_json(graph, registry()).prompt.nodes) == ["prompt"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (PAIRS / "uso_style_on.ui.json").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert plain(load("-", registry()).prompt.to_json()) == plain(pair("uso_style_on")[1])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_what_powershell_writes(encoding: str) -> None:
    data = (PAIRS / "uso_style_on.api.json").read_text().encode(encoding)
    assert plain(load_bytes(data, registry()).prompt.to_json()) == plain(pair("uso_style_on")[1])


def test_what_is_nearly_a_prompt_is_told() -> None:
    data = {**pair("uso_style_on")[1], "version": 0.4}
    with pytest.raises(UsoflowError, match="it has nodes, but 'version' is none"):
        load_json(data, registry())


def test_a_jpeg_is_named() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    with pytest.raises(UsoflowError, match="a JPEG carries no workflow"):
        load_bytes(stream.getvalue(), registry())


def test_a_name_that_begins_as_a_home_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors of texts call their copies so."""
    monkeypatch.chdir(tmp_path)
    Path("~nobody-of-this-name.json").write_bytes((PAIRS / "uso_style_on.api.json").read_bytes())
    assert load("~nobody-of-this-name.json", registry()).prompt.nodes


def test_missing_file(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing.json", tmp_path, "a\0b", "~nobody-of-this-name/a.json"):
        with pytest.raises(UsoflowError) as raised:
            load(name, registry())
        assert raised.value.code == "file_not_found"


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(UsoflowError, match=r"broken\.json") as raised:
        load(file, registry())
    assert raised.value.code == "not_a_workflow"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"5",
        b"[]",
        b"{}",
        b'{"a": 1e999}',
        b"9" * 5000,
        b"[" * 100_000,
        b"[" * 300 + b"]" * 300,
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBP",
    ],
)
def test_no_workflow(data: bytes) -> None:
    with pytest.raises(UsoflowError) as raised:
        load_bytes(data, registry())
    assert raised.value.code == "not_a_workflow"


def test_what_json_does_not_allow_becomes_null() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": [NaN, Infinity, -Infinity, 1.5]}') == {"a": [None, None, None, 1.5]}


@pytest.mark.shared
@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("example?.png")), ids=lambda file: file.name)
def test_community_example(file: Path) -> None:
    """The prompt that ComfyUI embedded equals our conversion of the workflow that it embedded."""
    loaded = load(file, registry())
    assert loaded.workflow is not None
    assert plain(load_json(loaded.workflow, registry()).prompt.to_json()) == plain(loaded.prompt.to_json())

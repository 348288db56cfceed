"""Workflows in pictures, written and read by Pillow and by us."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from usoflow.workflow import metadata
from webp import webp_exif

PROMPT = {"1": {"class_type": "A", "inputs": {"text": "ünïcödé 漢字 😀"}}}
WORKFLOW = {"nodes": [], "version": 0.4}


def picture(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format, **options)
    return buffer.getvalue()


def png() -> bytes:
    return picture("PNG", pnginfo=metadata.png_info(PROMPT, {"workflow": WORKFLOW}))


def webp() -> bytes:
    return picture("WEBP", exif=webp_exif(PROMPT, {"workflow": WORKFLOW}))


@pytest.mark.parametrize("make", [png, webp])
def test_round_trip(make: Any) -> None:
    data = make()
    assert metadata.is_picture(data)
    assert {key: json.loads(text) for key, text in metadata.read(data).items()} == {
        "prompt": PROMPT,
        "workflow": WORKFLOW,
    }


def test_pillow_reads_the_chunks_as_comfyui_writes_them() -> None:
    with Image.open(io.BytesIO(png())) as image:
        texts = image.text  # type: ignore[attr-defined]
    assert list(texts) == ["prompt", "workflow"]
    assert json.loads(texts["prompt"]) == PROMPT


def test_pillow_reads_the_exif_as_comfyui_writes_it() -> None:
    with Image.open(io.BytesIO(webp())) as image:
        exif = image.getexif()
    assert exif[0x0110].startswith('prompt:{"1"')
    assert exif[0x010F].startswith('workflow:{"nodes"')


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["tEXt", "iTXt"])
def test_all_text_chunks(kind: str, compressed: bool) -> None:
    info = PngInfo()
    add = info.add_text if kind == "tEXt" else info.add_itxt
    add("workflow", "some text ü", zip=compressed)
    add("other", "not wanted", zip=compressed)
    assert metadata.read(picture("PNG", pnginfo=info)) == {"workflow": "some text ü"}


def test_utf8_in_a_latin1_chunk() -> None:
    info = PngInfo()
    info.add(b"tEXt", b"prompt\0" + "漢字".encode())
    assert metadata.read(picture("PNG", pnginfo=info)) == {"prompt": "漢字"}


def test_an_animated_png() -> None:
    """Its texts stand in chunks of another type, after the pictures."""
    info = PngInfo()
    info.add(b"comf", b"prompt\0" + json.dumps(PROMPT).encode(), after_idat=True)
    data = picture("PNG", pnginfo=info, save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    assert json.loads(metadata.read(data)["prompt"]) == PROMPT


def test_a_compressed_text_does_not_unfold_without_end() -> None:
    info = PngInfo()
    info.add_text("prompt", "a" * (metadata.MAX_TEXT + 1000), zip=True)
    assert len(metadata.read(picture("PNG", pnginfo=info))["prompt"]) == metadata.MAX_TEXT


def test_other_files() -> None:
    jpeg = picture("JPEG")
    assert not metadata.is_picture(jpeg)
    assert metadata.read(jpeg) == {}
    assert metadata.read(picture("PNG")) == {}
    assert metadata.read(picture("WEBP")) == {}


@given(st.sampled_from([png(), webp()]), st.data())
@settings(deadline=None)
def test_damaged_pictures(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 5))):
        damaged[draw.draw(st.integers(12, len(data) - 1))] = draw.draw(st.integers(0, 255))
    found = metadata.read(bytes(damaged[: draw.draw(st.integers(0, len(data)))]))
    assert set(found) <= {"prompt", "workflow"}

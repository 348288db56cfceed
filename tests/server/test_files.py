"""Pictures in and out, saved workflows: nothing leaves its folder, nothing active is served."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, features

from e2e.real_server import until
from forbidden import forbid
from server.conftest import Serve
from usoflow.server import files
from usoflow.server.app import DECODED_AT_ONCE
from usoflow.server.context import Limits
from usoflow.server.routes import user


def picture(
    size: tuple[int, int] = (8, 6), mode: str = "RGB", kind: str = "PNG", colour: object = None
) -> bytes:
    """An encoded picture."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)  # type: ignore[arg-type]
    return buffer.getvalue()


def upload(client: TestClient, data: bytes, name: str = "a.png", **form: str) -> tuple[int, dict[str, str]]:
    """Upload; status and answer."""
    answer = client.post("/api/upload/image", files={"image": (name, data, "image/png")}, data=form)
    return answer.status_code, answer.json()


def test_links_to_what_nobody_may_read_are_not_offered(
    client: TestClient, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "secret").mkdir()
    for folder, name in (("input", "mine.png"), ("secret", "theirs.png")):
        (place / folder / name).write_bytes(picture())
    (place / "input" / "theirs.png").symlink_to(place / "secret" / "theirs.png")
    forbid(monkeypatch, place / "secret")
    assert client.get("/internal/files/input").json() == ["mine.png"]
    info = client.get("/object_info/LoadImage").json()
    assert info["LoadImage"]["input"]["required"]["image"][0] == ["mine.png"]


def test_upload_and_view(client: TestClient, place: Path) -> None:
    data = picture(colour=(1, 2, 3))
    assert upload(client, data) == (200, {"name": "a.png", "subfolder": "", "type": "input"})
    assert upload(client, data)[1]["name"] == "a.png"  # the same again
    other = picture(colour=(4, 5, 6))
    assert upload(client, other)[1]["name"] == "a (1).png"
    assert upload(client, other, overwrite="true")[1]["name"] == "a.png"
    assert upload(client, data, subfolder="x/y")[1] == {"name": "a.png", "subfolder": "x/y", "type": "input"}
    assert (place / "input" / "x" / "y" / "a.png").read_bytes() == data
    shown = client.get("/api/view?filename=a.png&type=input&rand=0.5&subfolder=")
    assert (shown.content, shown.headers["content-type"]) == (other, "image/png")
    assert client.get("/view?filename=a.png [input]").content == other
    assert sorted(client.get("/internal/files/input").json()) == ["a (1).png", "a.png"]
    assert not list((place / "input").rglob("*.part"))


def test_a_picture_uploaded_is_offered_at_once(client: TestClient) -> None:
    upload(client, picture(), "new.png")
    offered = client.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"][0]
    assert "new.png" in offered


def test_a_model_file_put_there_is_offered_at_once(
    client: TestClient, small_models: Path, serve: Serve
) -> None:
    added = small_models / "loras" / "another.safetensors"
    added.touch()
    try:
        assert "another.safetensors" in client.get("/models/loras").json()
        listed = client.get("/api/experiment/models/loras").json()
        assert {entry["name"] for entry in listed} >= {"another.safetensors"}
    finally:
        added.unlink()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<html><script>alert(1)</script>", "a.png"),
        (b"", "a.png"),
        (picture()[:40], "a.png"),
        (picture(), "."),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg"),
        (b"\x80\x04cos\nsystem\n", "a.png"),
    ],
)
def test_only_pictures_are_taken(client: TestClient, place: Path, data: bytes, name: str) -> None:
    status, answer = upload(client, data, name)
    assert (status, answer["error"]["type"]) == (415, "image_invalid")  # type: ignore[index]
    assert list((place / "input").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["a.html", "a.svg", "x.js", "Screenshot at 10.15.30", "a.png.", "a.png.HTM", "a.php\x20", "..html"],
)
def test_a_picture_gets_the_name_of_one(client: TestClient, place: Path, name: str) -> None:
    """No browser would run it, whatever it was called; an ending may also be none."""
    data = picture()
    assert upload(client, data, name) == (200, {"name": f"{name}.png", "subfolder": "", "type": "input"})
    assert [path.name for path in (place / "input").iterdir()] == [f"{name}.png"]
    assert client.get("/internal/files/input").json() == [f"{name}.png"]


@pytest.mark.parametrize(
    ("plain", "extended", "name"),
    [
        ("=?utf-8?B?54yrLnBuZw==?=", "; filename*=utf-8''%E7%8C%AB.png", "猫.png"),  # as .NET sends it
        ("x.png", "; filename*=UTF-8'en'%E7%8C%AB", "猫.png"),
        ("M.png", ";filename*=iso-8859-1''M%FCller.png", "Müller.png"),
        ("a.png", "; filename*=klingon''b.png", "a.png"),
        ("a.png", "", "a.png"),
        ("a.png", "; filename*=utf-8''..%2Fb.png", ""),
    ],
)
def test_a_name_that_is_not_ascii_may_come_another_way(
    client: TestClient, plain: str, extended: str, name: str
) -> None:
    head = f'--x\r\nContent-Disposition: form-data; name="image"; filename="{plain}"{extended}\r\n\r\n'
    body = head.encode() + picture() + b"\r\n--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/upload/image", content=body, headers=headers).json()
    assert answer.get("name", "") == name
    assert client.get("/internal/files/input").json() == ([name] if name else [])


@pytest.mark.skipif(not features.check("avif"), reason="Pillow has no AVIF here")
def test_avif_is_a_picture(client: TestClient) -> None:
    data = picture((64, 48), kind="AVIF")
    assert upload(client, data, "blob")[1]["name"] == "blob.avif"
    assert client.get("/view?filename=blob.avif&type=input").headers["content-type"] == "image/avif"
    assert client.get("/internal/files/input").json() == ["blob.avif"]
    offered = client.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"][0]
    assert "blob.avif" in offered


@pytest.mark.parametrize(
    ("kind", "name"), [("PNG", "blob.png"), ("JPEG", "blob.jpeg"), ("WEBP", "blob.webp")]
)
def test_what_browsers_call_blob_is_named_by_its_content(
    client: TestClient, place: Path, kind: str, name: str
) -> None:
    """`form.append("image", blob)` of a script gives no other name."""
    data = picture(kind=kind)
    assert upload(client, data, "blob") == (200, {"name": name, "subfolder": "", "type": "input"})
    assert (place / "input" / name).read_bytes() == data
    form = {"original_ref": json.dumps({"filename": name, "type": "input"}), "overwrite": "true"}
    mask = client.post("/upload/mask", files={"image": ("blob", picture(mode="RGBA"))}, data=form)
    assert mask.json()["name"] == "blob.png"


def test_few_pictures_are_decoded_at_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may need a GB; and whoever asks for something else meanwhile does not wait."""
    upload(client, picture(), "a.png")
    at_once, most, going_on = 0, 0, threading.Event()

    def slow(data: bytes, pixels: int) -> Image.Image:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        going_on.wait(10)
        at_once -= 1
        return Image.open(io.BytesIO(data))

    monkeypatch.setattr(files, "upright", slow)
    with ThreadPoolExecutor(60) as pool:
        ask = {"filename": "a.png", "type": "input"}
        asked = [pool.submit(client.get, "/view", params={**ask, "preview": f"webp;{n}"}) for n in range(60)]
        until(lambda: at_once == DECODED_AT_ONCE)
        assert client.get("/view", params=ask).status_code == 200
        assert client.get("/queue").status_code == 200
        going_on.set()
        assert {answer.result().status_code for answer in asked} == {200}
    assert most == DECODED_AT_ONCE


def test_what_is_made_of_a_picture_is_made_once(client: TestClient, place: Path) -> None:
    upload(client, picture(), "a.png")
    for more in ({"preview": "webp;50"}, {"channel": "rgb"}):
        ask = {"filename": "a.png", "type": "input", **more}
        first = client.get("/view", params=ask)
        known = {"If-None-Match": first.headers["etag"]}
        assert client.get("/view", params=ask, headers=known).status_code == 304
        assert client.get("/view", params={**ask, "rand": "1"}, headers=known).status_code == 200
        upload(client, picture((9, 9)), "a.png", overwrite="true")
        again = client.get("/view", params=ask, headers=known)
        assert again.status_code == 200
        assert again.content != first.content
        upload(client, picture(), "a.png", overwrite="true")


def test_a_refused_upload_is_told_in_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """The editor's own words are only those of the status."""
    with caplog.at_level("INFO", "usoflow"):
        upload(client, b"no picture", "a.png")
    assert "An upload was refused: The file is not a picture. Use a PNG, JPEG or WebP picture." in caplog.text


def test_too_many_pixels_are_refused_before_they_are_read(serve: Serve) -> None:
    client = serve(limits=Limits(pixels=1000))
    assert upload(client, picture((30, 30)))[0] == 200
    status, answer = upload(client, picture((100, 100)))
    assert (status, answer["error"]["type"]) == (413, "image_too_large")  # type: ignore[index]


OUTSIDE = [
    "../secret.png",
    "x/../../secret.png",
    "/etc/passwd",
    "..\\secret.png",
    *(["C:\\x.png", "C:x.png"] if os.name == "nt" else []),
    "a\0.png",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leaves_its_folder(client: TestClient, place: Path, name: str) -> None:
    (place / "secret.png").write_bytes(picture())
    for parameters in (
        {"filename": name, "type": "input"},
        {"filename": "secret.png", "subfolder": name.removesuffix("secret.png") or "..", "type": "input"},
        {"filename": f"{name} [input]"},
    ):
        assert client.get("/api/view", params=parameters).status_code in (400, 404)
    assert upload(client, picture(), name="a.png", subfolder=name)[0] == 400
    assert client.post(
        "/api/userdata/" + name.replace("/", "%2F").replace("\0", "%00"), content=b"x"
    ).status_code in (
        400,
        404,
    )
    files = [path.name for path in place.rglob("*") if path.is_file() and "state" not in path.parts]
    assert files == ["secret.png"]


@pytest.mark.parametrize(
    "name", ["%2e%2e/secret.png", "%2e%2e%2fsecret.png", "..%2fsecret.png", "%252e%252e%252f"]
)
def test_encoded_names_neither(client: TestClient, place: Path, name: str) -> None:
    (place / "secret.png").write_bytes(picture())
    (place / "state" / "secret.png").write_bytes(picture())
    assert client.get(f"/api/view?filename={name}&type=input").status_code in (400, 404)
    assert client.get(f"/api/userdata/{name}").status_code in (400, 404)


def test_preview_and_channel(client: TestClient, place: Path) -> None:
    (place / "output" / "a.png").write_bytes(picture(mode="RGBA", colour=(200, 100, 50, 128)))
    small = client.get("/view?filename=a.png&preview=webp;90")
    assert small.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(small.content)).format == "WEBP"
    assert client.get("/view?filename=a.png&preview=jpeg").headers["content-type"] == "image/jpeg"
    colours = Image.open(io.BytesIO(client.get("/view?filename=a.png&channel=rgb").content))
    assert (colours.mode, colours.getpixel((0, 0))) == ("RGB", (200, 100, 50))
    alpha = Image.open(io.BytesIO(client.get("/view?filename=a.png&channel=a").content))
    assert alpha.getpixel((0, 0)) == (0, 0, 0, 128)
    for odd in ("../../etc/passwd", "webp;../x", "webp;99999999999", "png;x", ";"):  # a format, never a path
        assert (
            client.get("/view", params={"filename": "a.png", "preview": odd}).headers["content-type"]
            == "image/webp"
        )


def test_mask(client: TestClient, place: Path) -> None:
    upload(client, picture((8, 6), colour=(10, 20, 30)), "a.png")
    mask = picture((4, 3), mode="RGBA", colour=(0, 0, 0, 77))
    form = {"original_ref": json.dumps({"filename": "a.png", "type": "input"})}
    answer = client.post("/upload/mask", files={"image": ("m.png", mask)}, data=form)
    assert answer.json()["name"] == "m.png"
    made = Image.open(place / "input" / "m.png")
    assert (made.size, made.getpixel((0, 0))) == ((8, 6), (10, 20, 30, 77))
    for reference in (
        "",
        "[]",
        "5",
        "{}",
        '{"filename": "../a.png", "type": "input"}',
        '{"filename": "none.png"}',
    ):
        odd = client.post("/upload/mask", files={"image": ("m.png", mask)}, data={"original_ref": reference})
        assert odd.status_code in (400, 404)


def test_missing_is_404_not_500(client: TestClient) -> None:
    for query in ("", "?filename=none.png", "?filename=" + "x" * 5000, "?filename=a.png&type=nonsense"):
        assert client.get(f"/view{query}").status_code in (400, 404)


@pytest.mark.parametrize("kind", ["input", "output", "temp"])
def test_where_to_look_for_a_picture_that_is_missing(client: TestClient, kind: str) -> None:
    error = client.get(f"/view?filename=none.png&type={kind}").json()["error"]
    assert "--image" not in error["details"]
    (path,) = (word for word in error["details"].split() if word.startswith("/"))
    assert client.get(path).status_code == 200


def test_workflows_are_kept(client: TestClient) -> None:
    path = "/api/userdata/workflows%2Fmy%20work.json"
    written = client.post(f"{path}?overwrite=false&full_info=true", content=b'{"nodes": []}')
    assert (written.json()["path"], written.json()["size"]) == ("workflows/my work.json", 13)
    assert client.post(f"{path}?overwrite=false", content=b"other").status_code == 409
    assert client.get(path).content == b'{"nodes": []}'
    listed = client.get("/api/userdata?dir=workflows&recurse=true&split=false&full_info=true").json()
    assert [entry["path"] for entry in listed] == ["my work.json"]
    assert client.get("/userdata?dir=workflows&split=true").json() == [["my work.json", "my work.json"]]
    moved = client.post("/api/userdata/workflows%2Fmy%20work.json/move/workflows%2Fdeep%2Fb.json")
    assert moved.json() == "workflows/deep/b.json"
    assert client.get(path).status_code == 404
    assert client.delete("/api/userdata/workflows%2Fdeep%2Fb.json").status_code == 204
    assert client.delete("/api/userdata/workflows%2Fdeep%2Fb.json").status_code == 404
    assert client.get("/api/userdata?dir=nonsense").status_code == 404
    assert client.get("/api/userdata").status_code == 400


def test_a_folder_may_be_called_move(client: TestClient) -> None:
    assert client.post("/api/userdata/workflows%2Fmove%2Fa.json", content=b"{}").status_code == 200
    assert client.get("/api/userdata/workflows%2Fmove%2Fa.json").content == b"{}"
    moved = client.post("/api/userdata/workflows%2Fmove%2Fa.json/move/workflows%2Fmove%2Fb.json")
    assert moved.json() == "workflows/move/b.json"


def test_where_the_input_folder_cannot_be_made(client: TestClient, place: Path) -> None:
    shutil.rmtree(place / "input")
    (place / "input").write_text("no folder")
    status, answer = upload(client, picture(), name="a.png")
    assert 400 <= status < 600
    assert "cannot be written" in answer["error"]["details"] + answer["error"]["message"]


@pytest.mark.parametrize("name", ["x" * 300, "猫" * 100 + ".json", "a.json/b.json"])
def test_a_name_that_no_file_can_have_is_a_clear_error(client: TestClient, name: str) -> None:
    assert client.post("/userdata/a.json", content=b"{}").status_code == 200
    for answer in (
        client.post(f"/userdata/{name}", content=b"{}"),
        client.post(f"/userdata/a.json/move/{name}"),
        client.get("/userdata", params={"dir": name}),
        client.delete(f"/userdata/{name}"),
    ):
        assert 400 <= answer.status_code < 500, answer.text
    assert client.get("/userdata/a.json").content == b"{}"


def deep_grey(transparent: int) -> bytes:
    """A picture of 16 bits a pixel: greys that are 1, 2 and 128 in 8 bits."""
    buffer = io.BytesIO()
    levels = np.array([[257, 514, 32896]], dtype=np.uint16)
    Image.fromarray(levels).save(buffer, "PNG", transparency=transparent)
    return buffer.getvalue()


def test_16_bit_grey_is_shown_as_load_image_reads_it(client: TestClient, place: Path) -> None:
    (place / "output" / "deep.png").write_bytes(deep_grey(transparent=514))
    for more in ("preview=webp;100", "preview=jpeg;100", "channel=rgb"):
        answer = client.get(f"/view?filename=deep.png&{more}")
        with Image.open(io.BytesIO(answer.content)) as shown:
            greys = np.asarray(shown.convert("RGB"))[0, [0, 2], 0].astype(int)
        assert np.abs(greys - [1, 128]).max() < 12, more
    answer = client.get("/view?filename=deep.png&channel=a")
    with Image.open(io.BytesIO(answer.content)) as shown:
        assert np.asarray(shown.getchannel("A")).tolist() == [[255, 0, 255]]


def test_a_mask_on_16_bit_grey_keeps_its_greys(client: TestClient, place: Path) -> None:
    (place / "input" / "deep.png").write_bytes(deep_grey(transparent=514))
    mask = {"image": ("masked.png", picture((3, 1), "RGBA", colour=(0, 0, 0, 99)), "image/png")}
    reference = json.dumps({"filename": "deep.png", "type": "input"})
    assert client.post("/upload/mask", files=mask, data={"original_ref": reference}).status_code == 200
    with Image.open(place / "input" / "masked.png") as masked:
        pixels = np.asarray(masked).tolist()
    assert pixels == [[[1, 1, 1, 99], [2, 2, 2, 99], [128, 128, 128, 99]]]


def test_a_picture_that_is_cut_short_is_no_crash(client: TestClient, place: Path) -> None:
    whole = picture((64, 64), colour=(1, 2, 3))
    (place / "output" / "cut.png").write_bytes(whole[: len(whole) // 2])
    for more in ("preview=webp;90", "channel=rgb", "channel=a"):
        answer = client.get(f"/view?filename=cut.png&{more}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (415, "image_invalid"), more


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_name_that_is_no_text_hides_nothing_but_itself(client: TestClient, place: Path) -> None:
    """A picture called in Latin-1, out of an old archive, or with a path of Windows for a name."""
    Image.new("RGB", (4, 4)).save(place / "input" / "good.png")
    for name in (b"M\xfcller.png", b"M\\ller.png"):
        Path(os.fsdecode(os.fsencode(place / "input") + b"/" + name)).write_bytes(b"")
    assert client.get("/internal/files/input").json() == ["good.png"]
    offered = client.get("/object_info").json()["LoadImage"]["input"]["required"]["image"][0]
    assert "good.png" in offered
    assert not any("ller" in name for name in offered)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
@pytest.mark.parametrize("more", ["", "&full_info=true", "&split=true"])
def test_a_workflow_whose_name_is_no_text_hides_nothing_but_itself(
    client: TestClient, place: Path, more: str
) -> None:
    folder = place / "state" / "user" / "workflows"
    (folder / "good.json").write_text("{}")
    for name in (b"M\xfcller.json", b"M\\ller.json"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"{}")
    answer = client.get(f"/userdata?dir=workflows&recurse=true{more}")
    assert answer.status_code == 200
    assert len(answer.json()) == 1


def test_a_workflow_that_is_deleted_while_it_is_listed(
    client: TestClient, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place / "state" / "user" / "workflows"
    for name in ("a.json", "b.json"):
        (folder / name).write_text("{}")
    info = user._info

    def late(path: Path, root: Path) -> dict[str, object]:
        (folder / "a.json").unlink(missing_ok=True)
        return info(path, root)

    monkeypatch.setattr(user, "_info", late)
    listed = client.get("/userdata?dir=workflows&full_info=true").json()
    assert [entry["path"] for entry in listed] == ["b.json"]


@pytest.mark.parametrize("path", ["/view?filename=a.png", "/view?filename=a.bin", "/userdata/a.json"])
def test_what_a_client_has_is_not_sent_again(client: TestClient, place: Path, path: str) -> None:
    (place / "output" / "a.bin").write_bytes(b"data")
    (place / "output" / "a.png").write_bytes(picture())
    client.post("/userdata/a.json", content=b"{}")
    first = client.get(path)
    known = {"if-none-match": first.headers["etag"]}
    for headers in (known, {"if-modified-since": first.headers["last-modified"]}):
        again = client.get(path, headers=headers)
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", known["if-none-match"])
    (place / "output" / "a.bin").write_bytes(b"other data")
    (place / "output" / "a.png").write_bytes(picture((16, 16)))
    client.post("/userdata/a.json", content=b"[1]")
    changed = client.get(path, headers=known)
    assert (changed.status_code, changed.content != first.content) == (200, True)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jfif", "JPEG"), ("a.JPE", "JPEG"), ("a.apng", "PNG"), ("a.jpg", "JPEG")]
)
def test_rarer_names_of_pictures(client: TestClient, name: str, kind: str) -> None:
    assert upload(client, picture(kind=kind), name)[0] == 200
    assert client.get("/internal/files/input").json() == [name]
    offered = client.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"][0]
    assert name in offered


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_a_preview_is_as_wide_as_its_format_allows(client: TestClient, place: Path, kind: str) -> None:
    (place / "output" / "wide.png").write_bytes(picture((70_000, 10)))
    shown = client.get(f"/view?filename=wide.png&preview={kind}")
    assert shown.status_code == 200
    assert Image.open(io.BytesIO(shown.content)).width == 16_383


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_no_fault_of_the_client(
    client: TestClient, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = uuid.uuid4()
    monkeypatch.setattr("usoflow.api.saving.uuid.uuid4", lambda: fixed)
    folders = place / "input", place / "state" / "user" / "workflows"
    for folder in folders:
        (folder / f".{fixed.hex}.part").symlink_to("/dev/full")
    refused = client.post("/upload/image", files={"image": ("a.png", picture(), "image/png")})
    for answer in (refused, client.post("/userdata/workflows%2Fa.json", content=b"{}")):
        assert (answer.status_code, answer.json()["error"]["type"]) == (507, "save_failed")
    assert [path for folder in folders for path in folder.iterdir()] == []


def test_a_form_that_finds_no_room_is_no_fault_of_the_client(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette keeps large ones in a file."""

    def full(self: tempfile.SpooledTemporaryFile[bytes]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", full)
    answer = client.post("/upload/image", files={"image": ("a.png", bytes(3_000_000), "image/png")})
    assert (answer.status_code, answer.json()["error"]["type"]) == (507, "save_failed")
    assert "TMPDIR" in answer.text


def test_a_very_large_picture_of_ours_is_one(
    client: TestClient, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger than what Pillow takes for a bomb; it is not decoded."""
    (place / "output" / "large.png").write_bytes(picture((64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert client.get("/view?filename=large.png").headers["content-type"] == "image/png"


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA"])
def test_other_kinds_of_pictures_are_not_taken(client: TestClient, kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, kind)
    status, answer = upload(client, data.getvalue(), "a.png")
    assert (status, answer["error"]["type"]) == (415, "image_invalid")  # type: ignore[index]


def turned(colour: tuple[int, ...] = (255, 0, 0, 255)) -> bytes:
    """A PNG of 8 x 6 black pixels, the first of them coloured, that is meant to be seen turned clockwise."""
    image = Image.new("RGBA", (8, 6), (0, 0, 0, 255))
    image.putpixel((0, 0), colour)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def shown(client: TestClient, query: str) -> Image.Image:
    """What `/view` answers."""
    return Image.open(io.BytesIO(client.get(f"/view?{query}").content))


def test_pictures_are_seen_as_a_node_loads_them(client: TestClient, place: Path) -> None:
    (place / "output" / "phone.png").write_bytes(turned())
    for preview in ("webp", "jpeg"):
        assert shown(client, f"filename=phone.png&preview={preview}").size == (6, 8)
    colours = shown(client, "filename=phone.png&channel=rgb")
    assert (colours.size, colours.getpixel((5, 0))) == ((6, 8), (255, 0, 0))
    assert shown(client, "filename=phone.png&channel=a").size == (6, 8)


def test_a_mask_lies_over_the_picture_as_it_is_seen(client: TestClient, place: Path) -> None:
    (place / "input" / "phone.png").write_bytes(turned())
    form = {"original_ref": json.dumps({"filename": "phone.png", "type": "input"})}
    mask = {"image": ("m.png", turned((0, 0, 0, 0)))}
    assert client.post("/upload/mask", files=mask, data=form).status_code == 200
    with Image.open(place / "input" / "m.png") as made:
        assert (made.size, made.getexif().get(0x0112, 1)) == ((6, 8), 1)
        assert made.getpixel((5, 0)) == (255, 0, 0, 0)
        assert made.getpixel((0, 0)) == (0, 0, 0, 255)


def test_a_preview_is_as_transparent_as_its_format_can_be(client: TestClient, place: Path) -> None:
    (place / "output" / "glass.png").write_bytes(picture((16, 16), "RGBA", colour=(200, 100, 50, 128)))
    (place / "output" / "wall.png").write_bytes(picture((16, 16)))
    glass = shown(client, "filename=glass.png&preview=webp;90")
    assert glass.mode == "RGBA"
    assert abs(glass.getpixel((8, 8))[3] - 128) <= 2  # type: ignore[index]
    assert shown(client, "filename=glass.png&preview=jpeg").mode == "RGB"
    assert shown(client, "filename=wall.png&preview=webp").mode == "RGB"


@pytest.mark.parametrize(
    ("name", "told"),
    [("a b.png", "filename*=utf-8''a%20b.png"), ("a.png", 'filename="a.png"'), ("猫.png", "%E7%8C%AB.png")],
)
def test_a_picture_is_saved_under_its_name(client: TestClient, place: Path, name: str, told: str) -> None:
    (place / "output" / "x").mkdir()
    (place / "output" / "x" / name).write_bytes(picture())
    answer = client.get("/view", params={"filename": name, "subfolder": "x"})
    assert answer.headers["content-disposition"].startswith("inline; ")
    assert answer.headers["content-disposition"].endswith(told)


def test_what_cannot_be_looked_at_is_not_listed(
    client: TestClient, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that goes between two looks at it, a folder that nobody may read."""
    for name in ("gone.png", "there.png"):
        (place / "input" / name).write_bytes(picture())
    ask, look = os.path.isfile, Path.iterdir

    def late(path: str | Path) -> bool:
        found = ask(path)
        if Path(path).name == "gone.png":
            Path(path).unlink(missing_ok=True)
        return found

    def refused(folder: Path) -> Iterator[Path]:
        if folder == place / "output":
            raise PermissionError(13, "Permission denied")
        return look(folder)

    monkeypatch.setattr(os.path, "isfile", late)
    monkeypatch.setattr(Path, "iterdir", refused)
    assert client.get("/internal/files/input").json() == ["there.png"]
    assert client.get("/internal/files/output").json() == []


@pytest.mark.parametrize("query", ["a.bin", "a.png", "a.png&preview=webp", "a.png&channel=a", "mask"])
def test_a_file_that_may_not_be_read_is_not_there(
    client: TestClient, place: Path, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    (place / "output" / "a.png").write_bytes(picture())
    (place / "output" / "a.bin").write_bytes(b"data")
    opened = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent == place / "output":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    if query == "mask":
        form = {"original_ref": json.dumps({"filename": "a.png"})}
        answer = client.post("/upload/mask", files={"image": ("m.png", picture())}, data=form)
    else:
        answer = client.get(f"/view?filename={query}")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (404, "image_missing")
    assert "Permission denied" in error["message"]


def test_what_a_save_has_left_that_was_interrupted_is_no_workflow(client: TestClient, place: Path) -> None:
    folder = place / "state" / "user" / "workflows"
    for name in (f".{uuid.uuid4().hex}.part", "mine.part", ".mine.json"):
        (folder / name).write_text("{}")
    assert client.get("/userdata?dir=workflows").json() == [".mine.json", "mine.part"]


def test_older_names_of_model_folders_and_kinds_that_are_empty(client: TestClient) -> None:
    for older, name in (
        ("unet", "diffusion_models"),
        ("clip", "text_encoders"),
        ("clip_visions", "clip_vision"),
    ):
        for path in ("/models", "/experiment/models"):
            assert client.get(f"{path}/{older}").json() == client.get(f"{path}/{name}").json()
    assert client.get("/models/clip_visions").json()
    for path in ("/models/controlnet", "/models/embeddings", "/api/experiment/models/upscale_models"):
        assert client.get(path).json() == []

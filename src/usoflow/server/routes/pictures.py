"""`/upload/image`, `/upload/mask`, `/view`, `/internal/files`: pictures in and out."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import unquote

from anyio import to_thread
from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import Response
from PIL import Image
from starlette.concurrency import run_in_threadpool

from usoflow.errors import UsoflowError
from usoflow.file_names import can_be_told, inside
from usoflow.schema.values import image_location
from usoflow.server import files
from usoflow.server.context import Json, Server, ServerOf
from usoflow.server.sending import file_answer, remade_answer
from usoflow.settings import IMAGE_SUFFIXES

router = APIRouter(tags=["pictures"])
T = TypeVar("T")

NAMELESS: Final = "application/octet-stream"  # of what is no picture

# What .NET, for one, adds to a name that is not ASCII (RFC 6266); its plain one then is unreadable.
EXTENDED: Final = re.compile(r";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^\s;]+)", re.IGNORECASE)

FormText = Annotated[str, Form()]


async def _in_turn(server: Server, work: Callable[[], T]) -> T:
    """What decodes a picture: few at once, and in none of the threads that other routes need."""
    return await to_thread.run_sync(work, limiter=server.decoding)


@router.post("/upload/image")
async def upload_image(
    server: ServerOf,
    image: UploadFile,
    type: FormText = "input",
    subfolder: FormText = "",
    overwrite: FormText = "",
) -> Json:
    """Put a picture into the input folder (or output, temp)."""

    def put() -> Json:
        data = image.file.read()
        picture = files.read(data, server.settings.limits.pixels)
        name = _with_suffix(_name(image), picture.format or "")
        return _stored(server, name, data, type, subfolder, overwrite)

    return await _in_turn(server, put)


@router.post("/upload/mask")
async def upload_mask(
    server: ServerOf,
    image: UploadFile,
    original_ref: FormText,
    type: FormText = "input",
    subfolder: FormText = "",
    overwrite: FormText = "",
) -> Json:
    """Put a copy of a picture, with the transparency of the upload, into the input folder."""
    pixels = server.settings.limits.pixels

    def put() -> Json:
        mask = files.upright(image.file.read(), pixels).convert("RGBA").getchannel("A")
        full = files.upright(_original(server, original_ref), pixels).convert("RGBA")
        full.putalpha(mask.resize(full.size, Image.Resampling.LANCZOS))
        buffer = io.BytesIO()
        full.save(buffer, "PNG", compress_level=4)
        name = _with_suffix(_name(image), "PNG")
        return _stored(server, name, buffer.getvalue(), type, subfolder, overwrite)

    return await _in_turn(server, put)


@router.get("/view")
async def view(
    server: ServerOf,
    request: Request,
    filename: str = "",
    subfolder: str = "",
    type: str = "output",
    preview: str = "",
    channel: str = "",
) -> Response:
    """A picture, as it is, or re-encoded (`preview=webp;90`), or its colours or transparency (`channel`)."""

    def answer() -> Response:
        folder, name = image_location(filename)
        path = files.find(server.folders, folder if name != filename else type, subfolder, name)
        kind, pixels = files.content_type(path), server.settings.limits.pixels
        with files.reading(name):
            if kind and preview:
                return remade_answer(request, path, lambda: files.preview(path.read_bytes(), preview, pixels))
            if kind and channel in ("rgb", "a"):
                return remade_answer(request, path, lambda: files.channel(path.read_bytes(), channel, pixels))
            path.open("rb").close()  # while it can still be said that this cannot be done
            return file_answer(
                request,
                path,
                media_type=kind or NAMELESS,
                filename=inside(name).name,
                disposition="inline" if kind else "attachment",
            )

    return await (_in_turn(server, answer) if preview or channel else run_in_threadpool(answer))


@router.get("/internal/files/{type}")
def list_files(server: ServerOf, type: str) -> list[str]:
    """The pictures of a folder, the newest first."""
    times = [entry for root in files.roots(server.folders, type) for entry in _times(root)]
    return list(dict.fromkeys(name for _, name in sorted(times, key=lambda entry: entry[0], reverse=True)))


def _times(root: Path) -> Iterator[tuple[float, str]]:
    """When each picture of a folder was written; without what cannot be looked at, or has just gone."""
    with suppress(OSError):
        for path in root.iterdir():
            if path.suffix.lower() in IMAGE_SUFFIXES and can_be_told(path.name):
                with suppress(OSError):
                    if os.path.isfile(path):
                        yield path.stat().st_mtime, path.name


def _name(image: UploadFile) -> str:
    """The name of an upload."""
    extended = EXTENDED.search(image.headers.get("content-disposition", ""))
    return unquote(extended[2], extended[1]) if extended else image.filename or ""


def _with_suffix(name: str, format_: str) -> str:
    """A name that ends as those of pictures do.

    Browsers call what a script has made "blob", and what seems to be an ending may be none ("at 10.15.30").
    """
    path, suffix = PurePosixPath(name), files.PICTURE_TYPES[format_].replace("image/", ".")
    return name if _is_named_so(path) or not path.name else f"{path}{suffix}"


def _is_named_so(path: PurePosixPath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _stored(server: Server, name: str, data: bytes, type: str, subfolder: str, overwrite: str) -> Json:
    if not _is_named_so(PurePosixPath(name)):  # which a browser might run
        raise UsoflowError("image_invalid", f"{name!r} does not have the name of a picture.")
    root = files.roots(server.folders, type)[0]
    replace = overwrite.lower() in ("true", "1")
    path = server.uploads.put(root, subfolder, name, data, overwrite=replace)
    folder = path.parent.relative_to(root.resolve()).as_posix()
    return {"name": path.name, "subfolder": "" if folder == "." else folder, "type": type}


def _original(server: Server, reference: str) -> bytes:
    """The picture that a mask belongs to: {"filename", "subfolder", "type"}."""
    try:
        record: dict[str, Any] = json.loads(reference)
        name, folder = str(record["filename"]), str(record.get("type", "output"))
        path = files.find(server.folders, folder, str(record.get("subfolder", "")), name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsoflowError("body_invalid", "original_ref does not name a picture.") from None
    return files.content(path, name)

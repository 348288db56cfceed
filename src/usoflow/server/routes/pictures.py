"""`/upload/image`, `/upload/mask`, `/view`, `/internal/files`: pictures in and out."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import Response
from PIL import Image

from usoflow.errors import UsoflowError
from usoflow.schema.values import image_location
from usoflow.server import files
from usoflow.server.context import Json, Server, ServerOf
from usoflow.server.sending import file_answer
from usoflow.settings import IMAGE_SUFFIXES, is_text

router = APIRouter(tags=["pictures"])

# A file is data: a browser neither runs nor frames it, whatever is in it.
HARMLESS = {"Content-Security-Policy": "default-src 'none'; sandbox", "Cache-Control": "no-cache"}

FormText = Annotated[str, Form()]


@router.post("/upload/image")
def upload_image(
    server: ServerOf,
    image: UploadFile,
    type: FormText = "input",
    subfolder: FormText = "",
    overwrite: FormText = "",
) -> Json:
    """Put a picture into the input folder (or output, temp)."""
    data = image.file.read()
    picture = files.read(data, server.settings.limits.pixels)
    name = _with_suffix(image.filename or "", picture.format or "")
    return _stored(server, name, data, type, subfolder, overwrite)


@router.post("/upload/mask")
def upload_mask(
    server: ServerOf,
    image: UploadFile,
    original_ref: FormText,
    type: FormText = "input",
    subfolder: FormText = "",
    overwrite: FormText = "",
) -> Json:
    """Put a copy of a picture, with the transparency of the upload, into the input folder."""
    pixels = server.settings.limits.pixels
    mask = files.read(image.file.read(), pixels).convert("RGBA").getchannel("A")
    full = files.read(_original(server, original_ref).read_bytes(), pixels).convert("RGBA")
    full.putalpha(mask.resize(full.size, Image.Resampling.LANCZOS))
    buffer = io.BytesIO()
    full.save(buffer, "PNG", compress_level=4)
    name = _with_suffix(image.filename or "", "PNG")
    return _stored(server, name, buffer.getvalue(), type, subfolder, overwrite)


@router.get("/view")
def view(
    server: ServerOf,
    request: Request,
    filename: str = "",
    subfolder: str = "",
    type: str = "output",
    preview: str = "",
    channel: str = "",
) -> Response:
    """A picture, as it is, or re-encoded (`preview=webp;90`), or its colours or transparency (`channel`)."""
    folder, name = image_location(filename)
    path = files.find(server.folders, folder if name != filename else type, subfolder, name)
    kind, pixels = files.content_type(path), server.settings.limits.pixels
    if kind and preview:
        return _encoded(*files.preview(path, preview, pixels))
    if kind and channel in ("rgb", "a"):
        return _encoded(*files.channel(path, channel, pixels))
    if kind:
        return file_answer(request, path, media_type=kind, headers=HARMLESS)
    nameless = "application/octet-stream"
    return file_answer(request, path, media_type=nameless, filename=path.name, headers=HARMLESS)


@router.get("/internal/files/{type}")
def list_files(server: ServerOf, type: str) -> list[str]:
    """The pictures of a folder, the newest first."""
    found = [p for root in files.roots(server.folders, type) if os.path.isdir(root) for p in root.iterdir()]
    named = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and is_text(path.name)]
    pictures = [path for path in named if os.path.isfile(path)]
    newest = sorted(pictures, key=lambda path: path.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(path.name for path in newest))


def _encoded(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers=HARMLESS)


def _with_suffix(name: str, format_: str) -> str:
    """The name of an upload; browsers call what a script has made "blob"."""
    path, suffix = PurePosixPath(name), files.PICTURE_TYPES[format_].replace("image/", ".")
    return name if path.suffix or not path.name else f"{path}{suffix}"


def _stored(server: Server, name: str, data: bytes, type: str, subfolder: str, overwrite: str) -> Json:
    if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
        raise UsoflowError("image_invalid", f"{name!r} does not have the name of a picture.")
    root = files.roots(server.folders, type)[0]
    replace = overwrite.lower() in ("true", "1")
    path = server.uploads.put(root, subfolder, name, data, overwrite=replace)
    folder = path.parent.relative_to(root.resolve()).as_posix()
    return {"name": path.name, "subfolder": "" if folder == "." else folder, "type": type}


def _original(server: Server, reference: str) -> Path:
    """The picture that a mask belongs to: {"filename", "subfolder", "type"}."""
    try:
        record: dict[str, Any] = json.loads(reference)
        name, folder = str(record["filename"]), str(record.get("type", "output"))
        return files.find(server.folders, folder, str(record.get("subfolder", "")), name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsoflowError("body_invalid", "original_ref does not name a picture.") from None

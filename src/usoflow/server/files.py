"""Safe paths and pictures: what clients name stays in its folder, what they upload is a picture."""

from __future__ import annotations

import errno
import io
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps

from usoflow.api.saving import write_whole
from usoflow.errors import UsoflowError
from usoflow.file_names import inside
from usoflow.settings import Folders
from usoflow.workflow.metadata import PNG_SIGNATURE

# What a browser shows as a picture; everything else is offered for download as a nameless kind of file.
PICTURE_TYPES: Final[Mapping[str, str]] = {
    "PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp",
    "TIFF": "image/tiff", "MPO": "image/jpeg", "AVIF": "image/avif",
}  # fmt: skip
OPENED: Final = tuple(kind for kind in PICTURE_TYPES if kind != "MPO")  # which is opened as a JPEG
PREVIEW_FORMATS: Final = ("webp", "jpeg")
DEFAULT_QUALITY: Final = 90
LONGEST_SIDE: Final = 16_383  # of a WebP
FULL: Final = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def within(root: Path, name: str) -> Path:
    """A path in a folder, links followed.

    Raises:
        UsoflowError: `path_outside` for whatever leads out of the folder, by name or by symbolic link.
    """
    try:
        name.encode()
        path = (root / inside(name)).resolve()
        home = root.resolve()
    except (OSError, RuntimeError, UnicodeEncodeError):  # too long; links in a circle; half a character
        raise UsoflowError("path_outside", "The name cannot be that of a file.") from None
    if path != home and home not in path.parents:
        raise UsoflowError("path_outside", f"{name!r} is not a name inside a folder.")
    return path


def roots(folders: Folders, kind: str) -> tuple[Path, ...]:
    """The folders that a client calls "input", "output" or "temp". Raises UsoflowError `path_outside`."""
    found = folders.picture_roots(kind)
    if not found:
        raise UsoflowError("path_outside", f"There is no folder {kind!r}, only input, output and temp.")
    return found


def find(folders: Folders, kind: str, subfolder: str, name: str) -> Path:
    """A file that a client names. Raises UsoflowError `image_missing`, `path_outside`."""
    for root in roots(folders, kind):
        path = within(root, f"{subfolder}/{name}" if subfolder else name)
        if os.path.isfile(path):
            return path
    advice = f"/internal/files/{kind} lists the pictures there, without those in subfolders."
    raise UsoflowError("image_missing", f"There is no {name!r} in {kind}.", remedy=advice)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Where a file that is gone since it was found, or may not be read, is UsoflowError `image_missing`."""
    try:
        yield
    except OSError as error:
        advice = "Look whether it is still there, and may be read."
        what = f"{name!r} cannot be read: {error.strerror}."
        raise UsoflowError("image_missing", what, remedy=advice) from None


def content(path: Path, name: str) -> bytes:
    """What is in a file that a client calls `name`. Raises UsoflowError `image_missing`."""
    with reading(name):
        return path.read_bytes()


def content_type(path: Path) -> str | None:
    """The type of a picture by its content; None for everything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                return PICTURE_TYPES.get(picture.format or "")
    except Image.DecompressionBombError:  # a very large one, as our own nodes can make it
        with reading(path.name), path.open("rb") as file:
            return PICTURE_TYPES["PNG"] if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE else None
    except Exception:  # Pillow's parsers raise whatever they meet in a damaged file
        return None


def read(data: bytes, pixels: int) -> Image.Image:
    """The picture that bytes are, of at most so many pixels.

    Raises:
        UsoflowError: `image_invalid`, `image_too_large`.
    """
    picture = _opened(data, pixels)
    with _decoding():
        picture.load()
    return picture


def upright(data: bytes, pixels: int) -> Image.Image:
    """The same as `LoadImage` reads it: turned as its EXIF says, of 8 bits."""
    from usoflow.nodes.pictures import of_8_bits

    picture = read(data, pixels)
    with _decoding():
        return of_8_bits(ImageOps.exif_transpose(picture))


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # as above
        raise UsoflowError("image_invalid", f"The file cannot be read as a picture: {error}.") from None


def _opened(data: bytes, pixels: int) -> Image.Image:
    """A picture whose pixels have not been read yet."""
    from usoflow.nodes.pictures import frame_count

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=OPENED)
        size = picture.width * picture.height * frame_count(picture)
    except Image.DecompressionBombError:
        size = pixels + 1
    except Exception:  # as above
        raise UsoflowError("image_invalid", "The file is not a picture.") from None
    if size > pixels:
        raise UsoflowError("image_too_large", f"{pixels // 10**6} million pixels are the most.")
    return picture


def preview(data: bytes, wanted: str, pixels: int) -> tuple[bytes, str]:
    """A picture re-encoded as "webp;90" or "jpeg;80" asks, smaller where it must be, and its type."""
    name, _, number = wanted.partition(";")
    kind = name if name in PREVIEW_FORMATS else PREVIEW_FORMATS[0]
    quality = int(number) if number.isdecimal() and 1 <= len(number) <= 3 else DEFAULT_QUALITY
    picture = upright(data, pixels)
    has_alpha = kind == "webp" and picture.has_transparency_data  # which a JPEG cannot have
    picture = picture.convert("RGBA" if has_alpha else "RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return _encoded(picture, kind.upper(), min(quality, 100)), f"image/{kind}"


def channel(data: bytes, wanted: str, pixels: int) -> tuple[bytes, str]:
    """The colours ("rgb") or the transparency ("a") of a picture as PNG."""
    full = upright(data, pixels).convert("RGBA")
    if wanted == "rgb":
        return _encoded(full.convert("RGB"), "PNG"), "image/png"
    alpha = Image.new("RGBA", full.size)
    alpha.putalpha(full.getchannel("A"))
    return _encoded(alpha, "PNG"), "image/png"


def _encoded(picture: Image.Image, format_: str, quality: int = DEFAULT_QUALITY) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, quality=quality)
    return buffer.getvalue()


@dataclass
class Uploads:
    """Puts files into a folder under free names, whole or not at all."""

    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, root: Path, subfolder: str, name: str, data: bytes, *, overwrite: bool) -> Path:
        """Write a file; one of the same name and content is left, another one makes it "name (1)".

        Raises:
            UsoflowError: `path_outside`, `save_failed`, `output_unwritable`.
        """
        target = within(root, f"{subfolder}/{name}" if subfolder else name)
        if target == root.resolve() or not name:
            raise UsoflowError("path_outside", "The upload has no file name.")
        with self._lock, writing("The upload"):
            path = target if overwrite else _free(target, data)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
        return path


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Where a full disk is UsoflowError `save_failed`, and too long a name, say, `output_unwritable`."""
    try:
        yield
    except OSError as error:
        code = "save_failed" if error.errno in FULL else "output_unwritable"
        raise UsoflowError(code, f"{what} cannot be written: {error.strerror}.") from None


def _free(target: Path, data: bytes) -> Path:
    path, number = target, 0
    while path.exists() and not (path.is_file() and path.read_bytes() == data):
        number += 1
        path = target.with_name(f"{target.stem} ({number}){target.suffix}")
    return path

"""The workflow and the prompt inside a picture, where ComfyUI puts them.

PNG: text chunks "prompt" and "workflow" (tEXt, zTXt or iTXt; PNG specification, section 11.3.3; in animated
ones `comf`, which is laid out as tEXt is).
WebP: EXIF texts that start with "prompt:" or "workflow:" (tags 0x0110 Model and 0x010F Make downwards).
Reading goes by content, never by file name: many a .webp is a PNG.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
KEYS: Final = ("prompt", "workflow")
MAX_TEXT: Final = 64 * 2**20  # bytes that a compressed text may unfold to


def is_picture(data: bytes) -> bool:
    """Whether the bytes are of a format whose metadata can be read."""
    return data.startswith(PNG_SIGNATURE) or _is_webp(data)


def read(data: bytes) -> dict[str, str]:
    """The texts "prompt" and "workflow" in a PNG or WebP, if it has them; skips what is damaged."""
    found = (
        _png_texts(data) if data.startswith(PNG_SIGNATURE) else _webp_texts(data) if _is_webp(data) else ()
    )
    texts: dict[str, str] = {}
    for key, text in found:
        if key in KEYS:
            texts.setdefault(key, text)
    return texts


def png_info(prompt: object, extra: Mapping[str, Any]) -> PngInfo:
    """Text chunks for Pillow's `save(..., pnginfo=...)`: the prompt and the entries of `extra`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", json.dumps(prompt))
    for key, value in extra.items():
        info.add_text(key, json.dumps(value))
    return info


def _png_texts(data: bytes) -> Iterator[tuple[str, str]]:
    for kind, body in _png_chunks(data):
        keyword, _, rest = body.partition(b"\0")
        text: bytes | None = None
        if kind in (b"tEXt", b"comf"):
            text = rest
        elif kind == b"zTXt":
            text = _inflate(rest[1:])
        elif kind == b"iTXt" and len(rest) >= 2:
            parts = rest[2:].split(b"\0", 2)  # language, translated keyword, text
            body = parts[2] if len(parts) == 3 else b""
            text = _inflate(body) if rest[0] else body
        if text is not None:
            yield keyword.decode("latin-1"), _decoded(text)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Chunk types and bodies until the end, or until the file breaks off."""
    position = len(PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 8
        yield kind, data[position : position + length]
        position += length + 4  # the check sum


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _webp_texts(data: bytes) -> Iterator[tuple[str, str]]:
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        position += 8
        if kind == b"EXIF":
            yield from _exif_texts(data[position : position + length])
        position += length + length % 2


def _exif_texts(data: bytes) -> Iterator[tuple[str, str]]:
    """ "key:text" entries of the main directory (TIFF 6.0, section 2: type 2 is ASCII)."""
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return
    (directory,) = struct.unpack_from(order + "I", data, 4)
    if directory + 2 > len(data):
        return
    (count,) = struct.unpack_from(order + "H", data, directory)
    for entry in range(directory + 2, min(directory + 2 + 12 * count, len(data) - 11), 12):
        _, kind, length, offset = struct.unpack_from(order + "HHII", data, entry)
        if kind == 2 and length > 4:
            key, colon, text = data[offset : offset + length].rstrip(b"\0").partition(b":")
            if colon:
                yield key.decode("latin-1").lower(), _decoded(text)


def _inflate(data: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT)
    except zlib.error:
        return None


def _decoded(text: bytes) -> str:
    """PNG says Latin-1, but some writers put UTF-8; JSON in ASCII is both."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")

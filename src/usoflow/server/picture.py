"""Pictures drawn by us: the input of the USO template under the name that it expects, and thumbnails."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw

from usoflow.api.saving import write_whole

NAME: Final = "flux1_dev_uso_reference_image_gen_input_image.png"
SIZE: Final = 768
_SCALE: Final = 2  # drawn larger, for smooth edges

THUMBNAIL: Final = 384

_SKY, _BODY, _DARK, _GLOW, _CHEEK = "#f4e9d8", "#3a86a8", "#24323f", "#ffd166", "#ef6f6c"

_SHADES: Final = ((0, 45, 88), (190, 45, 45))  # of sky and body: degrees from the name's, saturation, light


def provide(folder: Path) -> None:
    """Put the picture into a folder, unless it is there."""
    path = folder / NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        draw().save(buffer, "PNG")
        write_whole(path, buffer.getvalue())


def thumbnail(name: str) -> bytes:
    """A WebP for the template browser: the robot, in colours that follow from the name."""
    turn = zlib.crc32(name.encode())
    sky, body = (f"hsl({(turn + part) % 360}, {s}%, {light}%)" for part, s, light in _SHADES)
    buffer = io.BytesIO()
    draw(sky, body).resize((THUMBNAIL, THUMBNAIL)).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def draw(sky: str = _SKY, body: str = _BODY) -> Image.Image:
    """A small robot that waves."""
    picture = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), sky)
    pen = ImageDraw.Draw(picture)

    def box(*sides: int) -> tuple[int, ...]:
        return tuple(side * _SCALE for side in sides)

    pen.ellipse(box(170, 660, 600, 720), fill="#e0cfb4")  # shadow
    for left in (290, 410):
        pen.rounded_rectangle(box(left, 590, left + 70, 690), 30 * _SCALE, fill=_DARK)  # legs
    pen.line(box(520, 450, 620, 330), fill=_DARK, width=44 * _SCALE)  # the arm that waves
    pen.ellipse(box(582, 270, 662, 350), fill=_GLOW)
    pen.line(box(250, 450, 180, 560), fill=_DARK, width=44 * _SCALE)
    pen.ellipse(box(142, 530, 222, 610), fill=_GLOW)
    pen.rounded_rectangle(box(245, 400, 525, 630), 70 * _SCALE, fill=body)  # body
    pen.ellipse(box(345, 470, 425, 550), fill=_GLOW)
    pen.line(box(385, 150, 385, 90), fill=_DARK, width=12 * _SCALE)  # aerial
    pen.ellipse(box(362, 55, 408, 101), fill=_CHEEK)
    pen.rounded_rectangle(box(210, 140, 560, 420), 110 * _SCALE, fill=body)  # head
    pen.rounded_rectangle(box(250, 185, 520, 375), 80 * _SCALE, fill=_DARK)  # face
    for left in (300, 420):
        pen.ellipse(box(left, 230, left + 52, 290), fill=_GLOW)
    pen.arc(box(335, 270, 437, 345), 20, 160, fill=_GLOW, width=12 * _SCALE)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)

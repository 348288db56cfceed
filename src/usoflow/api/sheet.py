"""Contact sheets: pictures of a batch or sweep beside each other, each with its label below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_CELL = 512  # the longest side of a picture on the sheet; larger ones are scaled down
_LABEL = 28  # height of the line below a picture
_GAP = 8


def contact_sheet(pictures: Sequence[tuple[str, Image]], *, columns: int | None = None) -> Image:
    """One picture of many.

    Args:
        pictures: label and picture, in reading order.
        columns: default makes it about as high as wide.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or math.ceil(math.sqrt(len(pictures)))
    small = [(label, _thumbnail(picture)) for label, picture in pictures]
    wide = max(picture.width for _, picture in small) + _GAP
    high = max(picture.height for _, picture in small) + _LABEL + _GAP
    rows = math.ceil(len(small) / columns)
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_LABEL // 2)
    for number, (label, picture) in enumerate(small):
        left, top = _GAP + number % columns * wide, _GAP + number // columns * high
        sheet.paste(picture, (left, top))
        draw.text((left, top + picture.height + _LABEL // 4), label, fill="black", font=font)
    return sheet


def _thumbnail(picture: Image) -> Image:
    copy = picture.convert("RGB")
    copy.thumbnail((_CELL, _CELL))
    return copy

"""Contact sheets: pictures of a batch or sweep beside each other, each with its label below."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

_LARGEST = 512  # the longest side of a picture on the sheet; larger ones are scaled down
_LEAST = 256  # smaller ones are enlarged by a whole factor to about this
_LINE = 18  # height of a line of text
_TEXT = 14  # of its letters
_GAP = 8
SEPARATOR = " · "  # of the parts of a label, where it may be broken


def contact_sheet(pictures: Iterable[tuple[str, Image]], *, columns: int | None = None) -> Image:
    """One picture of many.

    Args:
        pictures: label and picture, in reading order; none is held longer than it is looked at.
        columns: default makes it about as high as wide.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_TEXT)
    texts, shown = zip(*((label, _fitted(picture)) for label, picture in pictures), strict=True)
    columns = columns or math.ceil(math.sqrt(len(shown)))
    wide = max(picture.width for picture in shown) + _GAP
    labels = [_wrapped(label, wide - _GAP, font) for label in texts]
    text = max(len(lines) for lines in labels) * _LINE + _GAP
    high = max(picture.height for picture in shown) + text
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (lines, picture) in enumerate(zip(labels, shown, strict=True)):
        left, top = _GAP + number % columns * wide, _GAP + number // columns * high
        sheet.paste(picture, (left, top))
        for line, words in enumerate(lines):
            draw.text((left, top + picture.height + 2 + line * _LINE), words, fill="black", font=font)
    return sheet


def _fitted(picture: Image) -> Image:
    from PIL import Image

    copy = picture.convert("RGB")
    factor = _LEAST // max(copy.size)
    if factor > 1:
        return copy.resize((copy.width * factor, copy.height * factor), Image.Resampling.BICUBIC)
    copy.thumbnail((_LARGEST, _LARGEST))
    return copy


def _wrapped(label: str, width: int, font: FreeTypeFont | BitmapFont) -> list[str]:
    """Lines that are no wider than a picture, if the parts of the label are not."""
    lines = [""]
    for part in label.split(SEPARATOR):
        longer = lines[-1] + SEPARATOR + part if lines[-1] else part
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines

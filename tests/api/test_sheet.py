"""Contact sheets: where pictures and labels stand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from usoflow.api.sheet import SEPARATOR, contact_sheet


def dark(sheet: Image.Image, box: tuple[int, int, int, int]) -> bool:
    """Whether something is written in a part of it."""
    return bool((np.asarray(sheet.crop(box)) < 100).any())


def test_a_grid_in_reading_order() -> None:
    colours = ["red", "lime", "blue", "yellow", "magenta"]
    sheet = contact_sheet([(colour, Image.new("RGB", (300, 200), colour)) for colour in colours], columns=2)
    assert sheet.width == 2 * 308 + 8
    row = (sheet.height - 8) // 3
    found = [sheet.getpixel((150 + number % 2 * 308, 100 + number // 2 * row)) for number in range(5)]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    assert dark(sheet, (8, 208, 300, 230))  # a label below its picture
    assert not dark(sheet, (316, 8 + 2 * row, sheet.width, sheet.height))  # the place that stays empty


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 32), (256, 128)), ((200, 100), (200, 100)), ((1024, 512), (512, 256))]
)
def test_small_pictures_are_enlarged_and_large_ones_reduced(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    sheet = contact_sheet([("a", Image.new("RGB", size, "red"))])
    assert sheet.width == expected[0] + 16
    assert sheet.getpixel((8 + expected[0] - 1, 8 + expected[1] - 1)) == (255, 0, 0)
    assert sheet.getpixel((8, 8 + expected[1])) == (255, 255, 255)


def test_a_long_label_goes_on_in_the_next_line() -> None:
    """Nothing is written into the neighbour's column."""
    label = SEPARATOR.join(["steps 20", "subject-size 1024", "guidance 3.5", "seed 1234567890"])
    sheet = contact_sheet(
        [(label, Image.new("RGB", (64, 64), "white")), ("", Image.new("RGB", (64, 64), "white"))]
    )
    assert dark(sheet, (8, 264, 264, 282))
    assert dark(sheet, (8, 284, 264, 300))
    assert not dark(sheet, (268, 264, sheet.width, sheet.height))

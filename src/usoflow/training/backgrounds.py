"""Backgrounds with a name: pure functions from a size and a random generator to a picture.

Every function returns float32 RGB [S, S, 3] in 0..1. `scenes` draws one of `BACKGROUNDS` and puts its
phrase into the caption; `evaluate` asks a classifier which of them a picture shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]
Colour = tuple[float, float, float]
Paint = Callable[[int, np.random.Generator], Picture]


@dataclass(frozen=True, slots=True)
class Background:
    """What to paint, and how a caption says it."""

    phrase: str
    paint: Paint


def _grid(side: int) -> tuple[Picture, Picture]:
    """Row and column of every pixel as a fraction of the side; both [S, S]."""
    steps = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.broadcast_to(steps[:, None], (side, side)), np.broadcast_to(steps[None, :], (side, side))


def _blend(first: Colour | Picture, second: Colour | Picture, amount: npt.ArrayLike) -> Picture:
    """first where `amount` [S, S] is 0, second where it is 1."""
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return np.asarray(a + (b - a) * np.asarray(amount, np.float32)[..., None], np.float32)


def _soft(distance: npt.ArrayLike, side: int) -> Picture:
    """1 where a distance (fraction of the side) is negative, 0 where positive, one pixel of blur between."""
    return np.asarray(np.clip(0.5 - np.asarray(distance) * side, 0, 1), np.float32)


def _jitter(colour: Colour, rng: np.random.Generator, amount: float = 0.05) -> Colour:
    r, g, b = np.clip(np.array(colour) + rng.uniform(-amount, amount, 3), 0, 1)
    return float(r), float(g), float(b)


def plain(colour: Colour) -> Paint:
    """One colour, slightly different each time."""

    def paint(side: int, rng: np.random.Generator) -> Picture:
        return np.broadcast_to(np.array(_jitter(colour, rng, 0.04), np.float32), (side, side, 3)).copy()

    return paint


def banded(sky: Colour, far: Colour, near: Colour, *, horizon: float, wave: float = 0.0) -> Paint:
    """Sky above, ground below; the horizon is a wave or straight."""

    def paint(side: int, rng: np.random.Generator) -> Picture:
        rows, columns = _grid(side)
        line = horizon + rng.uniform(-0.05, 0.05)
        line = line + wave * np.sin(columns * rng.uniform(4, 8) + rng.uniform(0, 6.3))
        above = _blend(_jitter(sky, rng), (0.97, 0.97, 1.0), 0.5 * rows / horizon)
        below = _blend(_jitter(far, rng), _jitter(near, rng), (rows - horizon) / (1 - horizon))
        return np.clip(_blend(above, below, _soft(line - rows, side)), 0, 1)

    return paint


def beach(side: int, rng: np.random.Generator) -> Picture:
    """Sky, sea, sand."""
    rows, columns = _grid(side)
    shore = 0.62 + 0.02 * np.sin(columns * 9 + rng.uniform(0, 6.3)) + rng.uniform(-0.04, 0.04)
    sky = _blend(_jitter((0.45, 0.75, 0.97), rng), (0.85, 0.95, 1.0), rows * 2)
    sea = _blend(sky, _jitter((0.10, 0.50, 0.75), rng), _soft(0.40 - rows, side))
    foam = _blend(sea, (0.95, 0.98, 1.0), _soft(shore - 0.03 - rows, side))
    return np.clip(_blend(foam, _jitter((0.94, 0.84, 0.58), rng), _soft(shore - rows, side)), 0, 1)


def speckled(top: Colour, bottom: Colour, dot: Colour, *, count: int, radius: float) -> Paint:
    """A vertical gradient with round dots: stars, flakes, bubbles."""

    def paint(side: int, rng: np.random.Generator) -> Picture:
        rows, _ = _grid(side)
        picture = _blend(_jitter(top, rng), _jitter(bottom, rng), rows)
        for x, y, size in zip(*rng.random((2, count)), rng.uniform(0.5, 1.3, count), strict=True):
            centre = (int(x * side * 16), int(y * side * 16))
            cv2.circle(picture, centre, int(size * radius * side * 16), dot, -1, cv2.LINE_AA, 4)
        return picture

    return paint


def brick_wall(side: int, rng: np.random.Generator) -> Picture:
    """Red bricks in grey mortar."""
    rows, columns = _grid(side)
    courses = 8.0
    row = np.floor(rows * courses)
    along = columns * courses / 2 + (row % 2) / 2 + rng.random()
    shade = rng.uniform(0.85, 1.1, (16, 16))[row.astype(int) % 16, np.floor(along).astype(int) % 16]
    brick = np.clip(np.array(_jitter((0.70, 0.30, 0.22), rng), np.float32) * shade[..., None], 0, 1)
    mortar = ((rows * courses) % 1 < 0.15) | (along % 1 < 0.08)
    return _blend(brick.astype(np.float32), (0.80, 0.76, 0.72), mortar)


def checked(first: Colour, second: Colour, *, cells: int) -> Paint:
    """A chessboard."""

    def paint(side: int, rng: np.random.Generator) -> Picture:
        rows, columns = _grid(side)
        odd = (np.floor(rows * cells) + np.floor(columns * cells)) % 2
        return _blend(_jitter(first, rng), _jitter(second, rng), odd)

    return paint


def striped(first: Colour, second: Colour, *, count: int) -> Paint:
    """Diagonal stripes."""

    def paint(side: int, rng: np.random.Generator) -> Picture:
        rows, columns = _grid(side)
        wave = np.sin((rows + columns) * np.pi * count + rng.uniform(0, 6.3))
        return _blend(_jitter(first, rng), _jitter(second, rng), np.clip(wave * side / count / 3 + 0.5, 0, 1))

    return paint


def dotted(ground: Colour, dot: Colour, *, cells: int) -> Paint:
    """Polka dots."""

    def paint(side: int, rng: np.random.Generator) -> Picture:
        rows, columns = _grid(side)
        x, y = (columns * cells + rng.random()) % 1 - 0.5, (rows * cells + rng.random()) % 1 - 0.5
        return _blend(_jitter(ground, rng), _jitter(dot, rng), _soft((np.hypot(x, y) - 0.28) / cells, side))

    return paint


def wooden(side: int, rng: np.random.Generator) -> Picture:
    """Horizontal planks with grain."""
    rows, columns = _grid(side)
    plank = np.floor(rows * 6).astype(int)
    tone = rng.uniform(0.88, 1.08, 8)[plank] + 0.05 * np.sin(rows * 150 + 3 * np.sin(columns * 5 + plank))
    wood = np.clip(np.array(_jitter((0.66, 0.45, 0.26), rng), np.float32) * tone[..., None], 0, 1)
    return _blend(wood.astype(np.float32), (0.32, 0.20, 0.11), (rows * 6) % 1 < 0.1)


def city(side: int, rng: np.random.Generator) -> Picture:
    """Dark houses with lit windows before a violet evening."""
    rows, columns = _grid(side)
    sky = _blend(_jitter((0.36, 0.25, 0.55), rng), _jitter((0.98, 0.62, 0.50), rng), rows * 1.2)
    house = np.floor(columns * 7).astype(int)
    wall = (rows > rng.uniform(0.35, 0.65, 8)[house]).astype(np.float32)
    lit = ((columns * 28) % 2 < 1) & ((rows * 20) % 2 < 1)
    lit &= rng.random((21, 29))[np.floor(rows * 20).astype(int), np.floor(columns * 28).astype(int)] < 0.6
    front = _blend((0.13, 0.12, 0.25), (1.0, 0.85, 0.45), lit)
    return np.clip(_blend(sky, front, wall), 0, 1)


def sunset(side: int, rng: np.random.Generator) -> Picture:
    """A low sun over dark water."""
    rows, columns = _grid(side)
    sky = _blend(_jitter((0.55, 0.25, 0.55), rng), _jitter((1.0, 0.65, 0.25), rng), rows / 0.65)
    disc = np.hypot(columns - rng.uniform(0.2, 0.8), rows - 0.6) - 0.14
    lit = _blend(sky, (1.0, 0.93, 0.60), _soft(disc, side))
    water = _blend(_jitter((0.80, 0.40, 0.35), rng), (0.25, 0.12, 0.35), (rows - 0.68) / 0.32)
    return np.clip(_blend(lit, water, _soft(0.68 - rows, side)), 0, 1)


def forest(side: int, rng: np.random.Generator) -> Picture:
    """Trunks and dark green leaves."""
    rows, columns = _grid(side)
    light = _blend((0.62, 0.80, 0.50), (0.30, 0.52, 0.28), rows)
    trunk = (np.abs((columns * 5 + rng.random()) % 1 - 0.5) < 0.14).astype(np.float32)
    stand = _blend(light, _jitter((0.33, 0.22, 0.14), rng), trunk)
    line = 0.28 + 0.06 * np.sin(columns * 25 + rng.uniform(0, 6.3)) + 0.03 * np.sin(columns * 61)
    crown = _blend(stand, _jitter((0.12, 0.38, 0.17), rng), _soft(rows - line, side))
    return np.clip(_blend(crown, _jitter((0.28, 0.42, 0.16), rng), _soft(0.80 - rows, side)), 0, 1)


BACKGROUNDS: Mapping[str, Background] = MappingProxyType(
    {
        "white": Background("on a white background", plain((0.96, 0.96, 0.96))),
        "black": Background("on a black background", plain((0.05, 0.05, 0.06))),
        "blue": Background("on a light blue background", plain((0.55, 0.78, 0.95))),
        "yellow": Background("on a yellow background", plain((0.98, 0.85, 0.35))),
        "pink": Background("on a pink background", plain((0.98, 0.68, 0.78))),
        "green": Background("on a green background", plain((0.45, 0.78, 0.50))),
        "purple": Background("on a purple background", plain((0.52, 0.38, 0.75))),
        "beach": Background("on a beach", beach),
        "night sky": Background(
            "in the night sky",
            speckled((0.02, 0.03, 0.14), (0.12, 0.12, 0.38), (1.0, 1.0, 0.85), count=30, radius=0.008),
        ),
        "meadow": Background(
            "in a meadow",
            banded((0.50, 0.78, 0.98), (0.50, 0.80, 0.32), (0.25, 0.60, 0.22), horizon=0.55, wave=0.03),
        ),
        "brick wall": Background("in front of a brick wall", brick_wall),
        "snow": Background(
            "in the snow",
            speckled((0.62, 0.74, 0.86), (0.93, 0.96, 1.0), (1.0, 1.0, 1.0), count=45, radius=0.016),
        ),
        "desert": Background(
            "in a desert",
            banded((0.98, 0.80, 0.55), (0.90, 0.66, 0.36), (0.80, 0.50, 0.24), horizon=0.58, wave=0.06),
        ),
        "underwater": Background(
            "under water",
            speckled((0.20, 0.68, 0.85), (0.02, 0.22, 0.48), (0.60, 0.88, 0.95), count=14, radius=0.02),
        ),
        "sunset": Background("at sunset", sunset),
        "forest": Background("in a forest", forest),
        "city": Background("in a city at night", city),
        "wooden floor": Background("on a wooden floor", wooden),
        "chessboard": Background("on a chessboard", checked((0.93, 0.91, 0.85), (0.28, 0.28, 0.30), cells=6)),
        "stripes": Background("on red stripes", striped((0.88, 0.25, 0.25), (0.98, 0.93, 0.88), count=7)),
        "polka dots": Background("on polka dots", dotted((0.25, 0.65, 0.65), (0.97, 0.95, 0.85), cells=6)),
    }
)

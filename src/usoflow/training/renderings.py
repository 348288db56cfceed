"""Whole-picture styles: pure functions from one picture to the same picture drawn otherwise.

Every function takes float32 RGB [S, S, 3] in 0..1 and a random generator, and returns the same shape and
range. `scenes` applies one of them after composing; the names are those of `world.json`. Distances are
relative to the picture's side, so a picture looks alike at every size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]
Rendering = Callable[[Picture, np.random.Generator], Picture]

DUOTONES = (
    ((0.10, 0.05, 0.35), (1.00, 0.75, 0.55)),
    ((0.02, 0.20, 0.20), (0.95, 0.95, 0.60)),
    ((0.30, 0.00, 0.15), (1.00, 0.85, 0.90)),
    ((0.05, 0.10, 0.45), (0.55, 1.00, 0.75)),
)


def grey(picture: Picture) -> Picture:
    """Luma, [S, S]."""
    return np.asarray(picture @ np.array([0.299, 0.587, 0.114], np.float32), np.float32)


def edges(picture: Picture) -> Picture:
    """Strength of the edges, [S, S], about 0..1."""
    smooth = cv2.GaussianBlur(picture, (0, 0), picture.shape[0] / 128)
    x, y = (cv2.Sobel(smooth, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1)))
    strength = np.sqrt(x * x + y * y).max(axis=2) * (picture.shape[0] / 128)
    return np.asarray(np.clip(strength, 0, 1), np.float32)


def pixel_art(picture: Picture, rng: np.random.Generator) -> Picture:
    """A coarse grid of few colours."""
    side = picture.shape[0]
    small = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    small = np.round(small * 4) / 4
    return np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST), np.float32)


def pencil_sketch(picture: Picture, rng: np.random.Generator) -> Picture:
    """Grey strokes on paper: the picture divided by its blurred negative ("colour dodge")."""
    tone = grey(picture)
    blurred = cv2.GaussianBlur(1 - tone, (0, 0), picture.shape[0] / 40)
    sketch = np.clip(tone / np.maximum(1 - blurred, 1e-3), 0, 1) ** 2 * (0.75 + 0.25 * tone)
    grain = rng.standard_normal(tone.shape, np.float32) * 0.03
    return _rgb(np.clip(sketch * (1 - 0.5 * edges(picture)) + grain, 0, 1) * 0.95)


def halftone(picture: Picture, rng: np.random.Generator) -> Picture:
    """Flat colours with black dots that grow with darkness."""
    rows, columns = _grid(picture.shape[0])
    pitch = 2 * np.pi * 20
    waves = (np.sin((rows + columns) * pitch / 1.414) + np.sin((rows - columns) * pitch / 1.414)) / 4 + 0.5
    ink = np.clip((waves - grey(picture) * 1.1) * 4 + 0.2, 0, 1)
    return np.asarray(np.round(picture * 3) / 3 * (1 - 0.8 * ink[..., None]), np.float32)


def oil_painting(picture: Picture, rng: np.random.Generator) -> Picture:
    """Short strokes: colours smeared along a smooth random field."""
    side = picture.shape[0]
    raw = rng.standard_normal((2, side, side), np.float32).transpose(1, 2, 0)
    field = np.asarray(cv2.GaussianBlur(raw, (0, 0), side / 24), np.float32)
    field /= np.linalg.norm(field, axis=2, keepdims=True) + 1e-6
    here = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).astype(np.float32)
    places = [here + field * t * side / 48 for t in (-2, -1, 0, 1, 2)]
    taps = (cv2.remap(picture, at[..., 0], at[..., 1], cv2.INTER_LINEAR) for at in places)
    mean = np.mean(list(taps), axis=0)
    smear = cv2.medianBlur((np.clip(mean, 0, 1) * 255).astype(np.uint8), 5).astype(np.float32) / 255
    relief = rng.standard_normal((side, side), np.float32)
    return np.asarray(np.clip(smear * 1.1 - 0.05 + relief[..., None] * 0.03, 0, 1), np.float32)


def watercolour(picture: Picture, rng: np.random.Generator) -> Picture:
    """Pale washes with darker rims on rough paper."""
    side = picture.shape[0]
    wash = np.asarray(cv2.bilateralFilter(picture, 5, 0.3, side / 24), np.float32)
    paper = cv2.GaussianBlur(rng.standard_normal((side, side), np.float32), (0, 0), side / 32) * (side / 40)
    pale = 1 - (1 - wash) * (0.72 + 0.25 * paper)[..., None]
    return np.asarray(np.clip(pale * (1 - 0.3 * edges(wash))[..., None], 0, 1), np.float32)


def mosaic(picture: Picture, rng: np.random.Generator) -> Picture:
    """Square tiles with pale joints."""
    side, cells = picture.shape[0], 16
    tiles = cv2.resize(picture, (cells, cells), interpolation=cv2.INTER_AREA)
    tiles = np.clip(tiles * (0.85 + 0.3 * rng.random((cells, cells, 1), np.float32)), 0, 1)
    flat = cv2.resize(tiles, (side, side), interpolation=cv2.INTER_NEAREST)
    rows, columns = _grid(side)
    joint = ((rows * cells) % 1 < 0.2) | ((columns * cells) % 1 < 0.2)
    return np.asarray(np.where(joint[..., None], 0.85, flat), np.float32)


def duotone(picture: Picture, rng: np.random.Generator) -> Picture:
    """Two inks."""
    dark, light = (np.array(ink, np.float32) for ink in DUOTONES[rng.integers(len(DUOTONES))])
    tone = np.clip(grey(picture) * 1.2 - 0.1, 0, 1)[..., None]
    return np.asarray(dark + (light - dark) * tone, np.float32)


def blueprint(picture: Picture, rng: np.random.Generator) -> Picture:
    """Pale lines on blue paper with a grid."""
    rows, columns = _grid(picture.shape[0])
    squares = ((rows * 8) % 1 < 0.13) | ((columns * 8) % 1 < 0.13)
    line = np.clip(edges(picture) * 1.3 + 0.12 * squares + 0.1 * grey(picture), 0, 1)[..., None]
    paper = np.array([0.05, 0.22, 0.55], np.float32)
    return np.asarray(paper + (np.array([0.92, 0.96, 1.0], np.float32) - paper) * line, np.float32)


def engraving(picture: Picture, rng: np.random.Generator) -> Picture:
    """Black diagonal lines whose width follows the darkness."""
    rows, columns = _grid(picture.shape[0])
    wave = np.sin((rows + columns) * 2 * np.pi * 16) * 0.5 + 0.5
    ink = np.clip((wave - grey(picture) ** 0.8 * 1.05) * 4 + 0.3, 0, 1)
    ink = np.maximum(ink, edges(picture))
    return np.asarray(1 - ink[..., None] * np.array([0.88, 0.90, 0.93], np.float32) - 0.03, np.float32)


def neon(picture: Picture, rng: np.random.Generator) -> Picture:
    """Glowing outlines on black."""
    strength = edges(picture)[..., None]
    hue = cv2.GaussianBlur(picture, (0, 0), picture.shape[0] / 40)
    hue = hue / (hue.max(axis=2, keepdims=True) + 0.15)
    glow = cv2.GaussianBlur(strength * hue, (0, 0), picture.shape[0] / 32)
    return np.asarray(np.clip(strength * (0.35 + 0.65 * hue) + glow * 1.2 + 0.08 * picture, 0, 1), np.float32)


def stained_glass(picture: Picture, rng: np.random.Generator) -> Picture:
    """Panes of one bright colour each, in black lead."""
    side, cells = picture.shape[0], 13
    centres = (np.stack(np.meshgrid(*[np.arange(cells)] * 2), -1) + rng.random((cells, cells, 2))) / cells
    seeds = np.ones((side, side), np.uint8)
    places = np.clip(centres.reshape(-1, 2) * side, 0, side - 1).astype(int)
    seeds[places[:, 1], places[:, 0]] = 0
    _, pane = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    counts = np.maximum(np.bincount(pane.ravel()), 1)
    means = np.stack([np.bincount(pane.ravel(), picture[..., c].ravel()) / counts for c in range(3)], -1)
    means = np.clip(means.mean(1, keepdims=True) + (means - means.mean(1, keepdims=True)) * 1.5, 0, 1)
    lead = np.zeros(pane.shape, bool)
    lead[:, 1:] |= pane[:, 1:] != pane[:, :-1]
    lead[1:] |= pane[1:] != pane[:-1]
    return np.asarray(np.where(lead[..., None], 0.06, means[pane]), np.float32)


def poster(picture: Picture, rng: np.random.Generator) -> Picture:
    """Few loud colours with dark outlines."""
    flat = np.round(cv2.bilateralFilter(picture, 5, 0.4, 3.0) * 2) / 2
    return np.asarray(flat * (1 - 0.9 * (edges(picture) > 0.45))[..., None], np.float32)


def _rgb(tone: Picture) -> Picture:
    return np.repeat(np.asarray(tone, np.float32)[..., None], 3, axis=2)


def _grid(side: int) -> tuple[Picture, Picture]:
    """Row and column of every pixel as a fraction of the side; [S, 1] and [1, S]."""
    steps: Picture = np.asarray((np.arange(side) + 0.5) / side, np.float32)
    return steps.reshape(-1, 1), steps.reshape(1, -1)


RENDERINGS: Mapping[str, Rendering] = MappingProxyType(
    {
        "pixel art": pixel_art,
        "pencil sketch": pencil_sketch,
        "halftone comic": halftone,
        "oil painting": oil_painting,
        "watercolour": watercolour,
        "mosaic": mosaic,
        "duotone": duotone,
        "blueprint": blueprint,
        "engraving": engraving,
        "neon": neon,
        "stained glass": stained_glass,
        "poster": poster,
    }
)

"""Styles without a name: random colours, textures and outlines, of which no two are alike.

The drawing sets and renderings are fifteen styles; who has only seen these tells them apart by name and can
not draw a sixteenth. The lessons of Pocket USO therefore put a random look over some pictures: the style
picture and the target of a lesson share it, so that it can only be taken from the style picture. A look
follows from one number; `scenes.compose` applies it last. Distances are relative to the picture's side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from usoflow.training.renderings import edges, grey

Picture = npt.NDArray[np.float32]
PARTS = 3  # a look is one to so many different changes


def look(picture: Picture, seed: int) -> Picture:
    """The picture with the look number `seed`; float32 RGB [S, S, 3] in 0..1."""
    changes, rng = _parts(seed)
    for name in changes:
        picture = np.clip(CHANGES[name](picture, rng), 0, 1).astype(np.float32)
    return picture


def look_words(seed: int) -> str:
    """What the look number `seed` does, in words: "hatched, softened"."""
    return ", ".join(sorted(_parts(seed)[0]))


def _parts(seed: int) -> tuple[list[str], np.random.Generator]:
    """The names of a look's changes in their order, and the random numbers that follow."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 7]))
    names = list(CHANGES)
    chosen = rng.choice(len(names), int(rng.integers(1, PARTS + 1)), replace=False)
    return [names[int(number)] for number in chosen], rng


def _colours(picture: Picture, rng: np.random.Generator) -> Picture:
    """Colours mixed among themselves, with other saturation, contrast and tint."""
    mixed = np.eye(3) + rng.normal(0, 0.35, (3, 3))
    mixed /= mixed.sum(axis=1, keepdims=True)
    moved = picture @ mixed.T
    tone = moved.mean(axis=2, keepdims=True)
    moved = tone + (moved - tone) * rng.uniform(0.2, 1.7)
    return np.asarray((moved - 0.5) * rng.uniform(0.6, 1.5) + 0.5 + rng.normal(0, 0.12, 3), np.float32)


def _inks(picture: Picture, rng: np.random.Generator) -> Picture:
    """Dark, middle and light replaced by three random inks."""
    inks = np.sort(rng.random((3, 3)), axis=0) if rng.random() < 0.7 else rng.random((3, 3))
    tone = grey(picture)[..., None]
    low, high = np.clip(tone * 2, 0, 1), np.clip(tone * 2 - 1, 0, 1)
    drawn = inks[0] + (inks[1] - inks[0]) * low + (inks[2] - inks[1]) * high
    return np.asarray(picture + (drawn - picture) * rng.uniform(0.5, 1.0), np.float32)


def _levels(picture: Picture, rng: np.random.Generator) -> Picture:
    """Few levels of each colour."""
    steps = int(rng.integers(2, 6))
    return np.asarray(np.round(picture * steps) / steps, np.float32)


def _outlines(picture: Picture, rng: np.random.Generator) -> Picture:
    """Lines of one ink along the edges."""
    ink = rng.random(3) * 0.25 if rng.random() < 0.7 else 1 - rng.random(3) * 0.2
    line = np.clip(edges(picture) * rng.uniform(1, 3), 0, 1)[..., None] * rng.uniform(0.5, 1)
    return np.asarray(picture + (ink - picture) * line, np.float32)


def _hatching(picture: Picture, rng: np.random.Generator) -> Picture:
    """Lines or a lattice at any angle, of an ink that may follow the darkness."""
    side = picture.shape[0]
    place = (np.arange(side) + 0.5) / side
    angle, number = rng.uniform(0, np.pi), rng.uniform(8, 24)
    first = place[:, None] * np.sin(angle) + place * np.cos(angle)
    second = place[:, None] * np.cos(angle) - place * np.sin(angle)
    waves = np.sin(2 * np.pi * number * first)
    waves = waves if rng.random() < 0.5 else (waves + np.sin(2 * np.pi * number * second)) / 2
    threshold = grey(picture) * 2 - 1 if rng.random() < 0.6 else rng.uniform(-0.3, 0.6)
    covered = np.clip((waves - threshold) * 3, 0, 1)[..., None] * rng.uniform(0.3, 0.9)
    ink = rng.random(3) * 0.3 if rng.random() < 0.6 else 1 - rng.random(3) * 0.3
    return np.asarray(picture + (ink - picture) * covered, np.float32)


def _cells(picture: Picture, rng: np.random.Generator) -> Picture:
    """Coarse square cells."""
    side, cells = picture.shape[0], int(rng.integers(20, 56))
    small = cv2.resize(picture, (cells, cells), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST), np.float32)


def _soft(picture: Picture, rng: np.random.Generator) -> Picture:
    """Out of focus, or smeared in one direction."""
    width = picture.shape[0] * rng.uniform(0.006, 0.02)
    sides = (width, width) if rng.random() < 0.5 else (width * 2, width / 8)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), *sides), np.float32)


def _grain(picture: Picture, rng: np.random.Generator) -> Picture:
    """Grain, fine or coarse."""
    side = picture.shape[0]
    grain = rng.standard_normal((side, side), np.float32)
    if rng.random() < 0.5:
        grain = np.asarray(cv2.GaussianBlur(grain, (0, 0), side / 80) * (side / 30), np.float32)
    return np.asarray(picture + grain[..., None] * rng.uniform(0.04, 0.14), np.float32)


CHANGES: Mapping[str, Callable[[Picture, np.random.Generator], Picture]] = MappingProxyType(
    {
        "recoloured": _colours,
        "inked": _inks,
        "in few levels": _levels,
        "outlined": _outlines,
        "hatched": _hatching,
        "in cells": _cells,
        "softened": _soft,
        "grainy": _grain,
    }
)

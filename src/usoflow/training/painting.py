"""Many scenes drawn on all cores, as 8-bit pictures in one file.

Drawing is what a GPU cannot do for the lessons; a core draws some six hundred pictures of 128x128 a second.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import psutil

from usoflow.errors import UsoflowError
from usoflow.training.drawings import Sprites
from usoflow.training.kept import new_array, whole
from usoflow.training.scenes import Scene, compose
from usoflow.training.world import World

Pictures = npt.NDArray[np.uint8]  # [N, side, side, 3]
CHUNK = 128  # scenes that a process draws at once
SOFT = 0.5  # of pictures that are softened
WORKER = 400_000_000  # bytes of memory that a process which draws may need


def paint(sprites: Sprites, scenes: Sequence[Scene], side: int, path: Path) -> Pictures:
    """Draw scenes into `path`, unless they are there; mapped, uint8 [N, side, side, 3].

    Raises:
        UsoflowError: "training_data" if a process that draws is ended, for want of memory or disk.
    """
    shape = (len(scenes), side, side, 3)
    if not path.exists() or np.load(path, mmap_mode="r").shape != shape:
        with whole(path) as partial:
            new_array(partial, np.uint8, shape)
            jobs = [
                (sprites.world, sprites.folder, scenes[first : first + CHUNK], side, partial, first)
                for first in range(0, len(scenes), CHUNK)
            ]
            workers = max(1, min(_cores(), len(jobs), psutil.virtual_memory().available // WORKER))
            try:
                with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                    list(pool.map(_paint, *zip(*jobs, strict=True)))  # so that what goes wrong is told here
            except BrokenProcessPool:
                raise UsoflowError(
                    "training_data",
                    f"A process that drew pictures into {partial} was ended.",
                    remedy=f"Have {math.prod(shape) / 1e9:.1f} GB free there, and some memory.",
                ) from None
    pictures: Pictures = np.load(path, mmap_mode="c")
    return pictures


@contextmanager
def painted(sprites: Sprites, scenes: Sequence[Scene], side: int, path: Path) -> Iterator[Pictures]:
    """The same, for as long as they are needed; what is interrupted finds them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield paint(sprites, scenes, side, path)
    path.unlink()


def softened(
    pictures: npt.NDArray[np.float32], rng: np.random.Generator, *, widest: float
) -> npt.NDArray[np.float32]:
    """Some pictures a little out of focus, by up to `widest` pixels: made pictures are soft, too."""
    widths = rng.uniform(0.2, widest, len(pictures)) * (rng.random(len(pictures)) < SOFT)
    soft = [
        cv2.GaussianBlur(picture, (0, 0), float(width)) if width else picture
        for picture, width in zip(pictures, widths, strict=True)
    ]
    return np.stack(soft)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _paint(world: World, drawings: Path, scenes: Sequence[Scene], side: int, path: Path, first: int) -> None:
    cv2.setNumThreads(1)
    stored = np.load(path, mmap_mode="r+")
    sprites = Sprites(world, drawings)
    for number, scene in enumerate(scenes, first):
        stored[number] = np.round(compose(scene, sprites, side=side) * 255)

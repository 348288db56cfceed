"""Drawings for tests of the training: discs, for the true ones are not part of the repository."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from usoflow.training.drawings import SPRITE_SIDES
from usoflow.training.world import World

WHOLE = World.load()
WORLD = dataclasses.replace(WHOLE, things=WHOLE.things[:12], signs=WHOLE.signs[:4])  # less to write


def paint_sprites(folder: Path) -> None:
    """Discs of one colour per subject and set, in the files of the sprites."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (len(WORLD.drawn), len(WORLD.sets), 1, 1, 3)).astype(np.uint8)
    for side in SPRITE_SIDES:
        row = np.arange(side) - (side - 1) / 2
        disc = (row[:, None] ** 2 + row**2 < (side / 2.2) ** 2).astype(np.uint8)[..., None]
        shape = (len(WORLD.drawn), len(WORLD.sets), side, side, 4)
        stored = np.lib.format.open_memmap(
            folder / f"sprites-{side}.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        stored[..., :3], stored[..., 3:] = colours * disc, 255 * disc

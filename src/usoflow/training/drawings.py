"""The drawings that pictures are composed of: emoji of seven sets, fetched from npm and rendered once.

`fetch` runs `npm pack` for each set; `render_sprites` turns the SVG of every subject of the world into RGBA
pixels in one memory-mapped file; `Sprites` reads them for `scenes`. The drawings themselves are never part
of this package (licences: NOTICE).
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from usoflow.errors import UsoflowError
from usoflow.training.kept import whole
from usoflow.training.world import World

# Of the packages, with which the shipped models and judges were trained.
VERSIONS: Mapping[str, str] = MappingProxyType(
    {
        "emojione": "1.2.3",
        "fluent-emoji": "1.2.7",
        "fluent-emoji-flat": "1.2.6",
        "fluent-emoji-high-contrast": "1.2.6",
        "noto": "1.2.9",
        "noto-v1": "1.2.5",
        "twemoji": "1.2.5",
    }
)
SPRITE_SIDES = (128, 64)  # finest first; the coarser one is for small pictures
INK_ONLY = frozenset({"fluent-emoji-high-contrast"})  # black lines on nothing: lost on a dark background
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DrawingSet:
    """The SVG bodies of one npm package `@iconify-json/NAME`."""

    name: str
    icons: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, Mapping[str, Any]]
    side: tuple[int, int]

    @classmethod
    def read(cls, archive: Path, name: str) -> DrawingSet:
        """Read `package/icons.json` out of the archive that npm packed."""
        try:
            with tarfile.open(archive) as packed:
                member = packed.extractfile("package/icons.json")
                if member is None:
                    raise ValueError("package/icons.json is no file")
                data = json.load(member)
                return cls(name, data["icons"], data.get("aliases", {}), (data["width"], data["height"]))
        except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
            raise UsoflowError(
                "training_data",
                f"{archive} cannot be read: {error}.",
                remedy="Delete it and run `usoflow train render` to have it fetched anew.",
            ) from None

    def svg(self, subject: str) -> str:
        """The complete SVG of a subject; an alias is followed to its parent."""
        while subject not in self.icons and subject in self.aliases:
            subject = self.aliases[subject]["parent"]
        if subject not in self.icons:
            raise UsoflowError("training_data", f"The set {self.name} has no drawing of {subject}.")
        icon = self.icons[subject]
        width, height = icon.get("width", self.side[0]), icon.get("height", self.side[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def fetch(world: World, folder: Path) -> None:
    """Pack the npm packages of all sets into `folder`; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in world.sets:
        if not _archive(folder, name).exists():
            npm = shutil.which("npm") or "npm"  # on Windows it is npm.cmd, which nothing else finds
            command = [npm, "pack", "--silent", f"@iconify-json/{name}@{VERSIONS[name]}"]
            try:
                with tempfile.TemporaryDirectory(dir=folder) as partial:  # where npm may be interrupted
                    subprocess.run(command, cwd=partial, check=True, capture_output=True, text=True)
                    _archive(Path(partial), name).replace(_archive(folder, name))
            except subprocess.CalledProcessError as error:
                said = error.stderr.strip() or f"exit status {error.returncode}"
                raise UsoflowError("training_data", f"{' '.join(command)} failed: {said}") from None
            except OSError as error:
                raise UsoflowError("training_data", f"{' '.join(command)} failed: {error}.") from None


def _archive(folder: Path, name: str) -> Path:
    """The file that npm packs of the version that was trained with."""
    return folder / f"iconify-json-{name}-{VERSIONS[name]}.tgz"


def render_svg(svg: str, side: int) -> Pixels:
    """An SVG as RGBA of side x side, colours premultiplied with alpha, centred if it is not square."""
    import resvg_py

    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side)))).convert("RGBA")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    pixels = np.asarray(canvas).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return pixels.round().astype(np.uint8)


def on_paper(sprite: Pixels) -> Pixels:
    """An ink drawing cut out of white paper: what its lines enclose, and a rim around them, is white."""
    import cv2

    outside = np.pad((sprite[..., 3] < 64).astype(np.uint8), 1, constant_values=1)
    cv2.floodFill(outside, None, (0, 0), 2)
    inside = (outside[1:-1, 1:-1] != 2).astype(np.uint8) * 255
    paper = cv2.GaussianBlur(cv2.dilate(inside, np.ones((5, 5), np.uint8)), (3, 3), 0)
    alpha = sprite[..., 3:].astype(np.float32) / 255
    pixels = sprite + np.repeat(paper[..., None], 4, axis=2) * (1 - alpha)
    return np.clip(pixels, 0, 255).round().astype(np.uint8)


def rendered(folder: Path) -> bool:
    """Whether `render_sprites` has been here."""
    return all(_sprite_file(folder, side).exists() for side in SPRITE_SIDES)


def render_sprites(world: World, packages: Path, folder: Path) -> None:
    """Render every subject in every set into `folder/sprites-SIDE.npy`.

    Shape of each file: [drawn, sets, side, side, 4] uint8, premultiplied RGBA.
    """
    folder.mkdir(parents=True, exist_ok=True)
    large = SPRITE_SIDES[0]
    sprites = np.zeros((len(world.drawn), len(world.sets), large, large, 4), np.uint8)
    for column, name in enumerate(world.sets):
        drawings = DrawingSet.read(_archive(packages, name), name)
        for row, subject in enumerate(world.drawn):
            sprite = render_svg(drawings.svg(subject), large)
            sprites[row, column] = on_paper(sprite) if name in INK_ONLY else sprite
    for side in SPRITE_SIDES:
        n = large // side
        means = sprites.reshape(*sprites.shape[:2], side, n, side, n, 4).mean(axis=(3, 5), dtype=np.float32)
        path = _sprite_file(folder, side)
        with whole(path) as partial:
            np.save(partial, means.round().astype(np.uint8))


def _sprite_file(folder: Path, side: int) -> Path:
    return folder / f"sprites-{side}.npy"


@dataclass(frozen=True)
class Sprites:
    """Rendered drawings on disk, by subject and set."""

    world: World
    folder: Path

    @functools.cached_property
    def _levels(self) -> tuple[Pixels, ...]:
        return tuple(np.load(_sprite_file(self.folder, side), mmap_mode="r") for side in SPRITE_SIDES)

    def get(self, subject: str, drawing_set: str, *, at_least: int) -> Pixels:
        """Premultiplied RGBA [S, S, 4] uint8; S: smallest stored side >= `at_least`, else the largest."""
        sides = [i for i, side in enumerate(SPRITE_SIDES) if side >= at_least]
        level = self._levels[max(sides, default=0)]
        sprite: Pixels = level[self.world.drawn_index[subject], self.world.set_index[drawing_set]]
        return sprite

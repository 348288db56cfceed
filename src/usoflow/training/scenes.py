"""Scenes: which subject, where, on what, drawn how; composed to a picture and told in plain English.

`draw_scene(world, seed, index)` decides, `compose` paints (with `drawings.Sprites`), `caption` tells. Every
scene follows from (seed, index) alone: no state, so training resumes anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.drawings import Sprites
from usoflow.training.looks import look
from usoflow.training.renderings import RENDERINGS
from usoflow.training.world import World, words

Picture = npt.NDArray[np.float32]

PAIR_CHANCE = 0.12  # two subjects side by side
RENDERING_CHANCE = 0.3  # otherwise the drawings as they are
STYLE_TOLD_CHANCE = 0.8  # the caption names the style
PLACE_TOLD_CHANCE = 0.5  # the caption names position, size or tilt, where they are unusual
SMALL, LARGE = 0.55, 0.78  # below and above, a subject is called small or large
OFF_CENTRE = 0.08
SIDES = (0.42, 0.92)
TILTED = 25.0  # degrees
CALM_SIDES = (0.66, 0.9)
CALM_ANGLE = 6.0  # degrees
CALM_RENDERING = 0.4  # of the renderings stay
CALM_CHANCE = 0.7  # of what the base is taught
SINGULAR_IN_S = frozenset(
    {"bus", "oncoming-bus", "cactus", "octopus", "rhinoceros", "hibiscus", "cocktail-glass", "wine-glass"}
)


@dataclass(frozen=True, slots=True)
class Placed:
    """One subject: side, centre x and y as fractions of the picture's side; angle in degrees."""

    subject: str
    side: float
    x: float
    y: float
    angle: float
    mirrored: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything about one picture.

    Attributes:
        placed: one subject, or two from left to right.
        drawing_set: whose drawings.
        rendering: the whole-picture style, or None for the drawings as they are.
        background: a key of `BACKGROUNDS`.
        paint_seed: what random detail of background and rendering follows from.
        look: number of a random look over all that (`looks`), or None.
    """

    placed: tuple[Placed, ...]
    drawing_set: str
    rendering: str | None
    background: str
    paint_seed: int
    look: int | None = None


def generator(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one scene."""
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def draw_scene(world: World, seed: int, index: int, subjects: Sequence[str] | None = None) -> Scene:
    """The scene number `index` of the training world: seen styles, and `subjects`, else all seen ones."""
    rng = generator(seed, index)
    pair = rng.random() < PAIR_CHANCE
    subjects = subjects or world.seen_subjects
    names = [subjects[int(i)] for i in rng.choice(len(subjects), 2, replace=False)[: 2 if pair else 1]]
    placed = _side_by_side(names, rng) if pair else (alone(names[0], rng),)
    rendered = rng.random() < RENDERING_CHANCE
    rendering = world.seen_renderings[int(rng.integers(len(world.seen_renderings)))]
    drawing_set = world.seen_sets[int(rng.integers(len(world.seen_sets)))]
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(placed, drawing_set, rendering if rendered else None, background, int(rng.integers(2**62)))


def draw_calm_scene(world: World, seed: int, index: int, subjects: Sequence[str] | None = None) -> Scene:
    """As `draw_scene`, but one large upright subject, seldom rendered: where shapes are learnt soonest."""
    scene = draw_scene(world, seed, index, subjects)
    rng = np.random.Generator(np.random.Philox(key=[scene.paint_seed, 2]))
    side = float(rng.uniform(*CALM_SIDES))
    x, y = 0.5 + (1 - side) / 2 * rng.uniform(-1, 1, 2) * 0.8
    angle = float(rng.uniform(-CALM_ANGLE, CALM_ANGLE))
    placed = Placed(scene.placed[0].subject, side, float(x), float(y), angle, mirrored=False)
    rendering = scene.rendering if rng.random() < CALM_RENDERING else None
    return dataclasses.replace(scene, placed=(placed,), rendering=rendering)


def draw_taught_scene(world: World, seed: int, index: int) -> Scene:
    """What the base is taught: core subjects, in calm scenes more often than in others."""
    calm = generator(seed + 1, index).random() < CALM_CHANCE
    return (draw_calm_scene if calm else draw_scene)(world, seed, index, world.core)


def held_out_scene(world: World, seed: int, index: int) -> Scene:
    """A scene that training never shows: a held-out subject; any style, held-out ones included."""
    rng = generator(seed, index)
    name = world.held_out_subjects[int(rng.integers(len(world.held_out_subjects)))]
    rendering = list(world.renderings)[int(rng.integers(len(world.renderings)))]
    return Scene(
        (alone(name, rng),),
        list(world.sets)[int(rng.integers(len(world.sets)))],
        rendering if rng.random() < RENDERING_CHANCE else None,
        list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))],
        int(rng.integers(2**62)),
    )


def alone(name: str, rng: np.random.Generator, *, sides: tuple[float, float] = SIDES) -> Placed:
    """One subject of any size at any place, mostly upright."""
    side = float(rng.uniform(*sides))
    room = (1 - side) / 2
    x, y = 0.5 + room * rng.uniform(-1, 1, 2) * 0.9
    return Placed(name, side, float(x), float(y), _angle(rng), bool(rng.random() < 0.25))


def _side_by_side(names: list[str], rng: np.random.Generator) -> tuple[Placed, ...]:
    sides = rng.uniform(0.40, 0.52, 2)
    heights = 0.5 + rng.uniform(-0.15, 0.15, 2)
    return tuple(
        Placed(name, float(side), x, float(y), _angle(rng) / 3, False)
        for name, side, x, y in zip(names, sides, (0.26, 0.74), heights, strict=True)
    )


def _angle(rng: np.random.Generator) -> float:
    """Mostly upright, sometimes tilted."""
    spread = 45 if rng.random() < 0.15 else 10
    return float(rng.uniform(-spread, spread))


def compose(scene: Scene, sprites: Sprites, *, side: int) -> Picture:
    """The picture of a scene, float32 RGB [side, side, 3] in 0..1."""
    rng = np.random.Generator(np.random.Philox(key=[scene.paint_seed, 0]))
    picture = BACKGROUNDS[scene.background].paint(side, rng)
    for placed in scene.placed:
        picture = _paste(picture, placed, sprites, scene.drawing_set)
    picture = np.clip(picture, 0, 1)
    picture = RENDERINGS[scene.rendering](picture, rng) if scene.rendering else picture
    return picture if scene.look is None else look(picture, scene.look)


def pictures_of(sprites: Sprites, scenes: Sequence[Scene], side: int) -> Tensor:
    """The pictures of scenes, float32 [N, side, side, 3] in 0..1."""
    return torch.from_numpy(np.stack([compose(scene, sprites, side=side) for scene in scenes]))


def _paste(picture: Picture, placed: Placed, sprites: Sprites, drawing_set: str) -> Picture:
    side = picture.shape[0]
    sprite = sprites.get(placed.subject, drawing_set, at_least=int(placed.side * side * 0.9))
    if placed.mirrored:
        sprite = sprite[:, ::-1]
    scale = placed.side * side / sprite.shape[0]
    middle = (sprite.shape[0] - 1) / 2
    turn = cv2.getRotationMatrix2D((middle, middle), placed.angle, scale)
    turn[:, 2] += (placed.x * side - 0.5 - middle, placed.y * side - 0.5 - middle)
    layer = cv2.warpAffine(np.ascontiguousarray(sprite), turn, (side, side)).astype(np.float32) / 255
    return np.asarray(picture * (1 - layer[..., 3:]) + layer[..., :3], np.float32)


def caption(world: World, scene: Scene) -> str:
    """What the picture shows, in words; follows from the scene alone."""
    rng = np.random.Generator(np.random.Philox(key=[scene.paint_seed, 1]))
    told = rng.random() < PLACE_TOLD_CHANCE
    if len(scene.placed) == 1:
        what = described(scene.placed[0]) if told else noun(scene.placed[0].subject)
    else:
        what = " and ".join(noun(p.subject) for p in scene.placed)
    text = f"{what} {BACKGROUNDS[scene.background].phrase}"
    style = style_words(world, scene)
    return f"{text}, {style}" if style and rng.random() < STYLE_TOLD_CHANCE else text


def full_caption(world: World, scene: Scene) -> str:
    """Subjects, background and style, all told; not where the subjects are."""
    return f"{content_words(scene)}, {style_words(world, scene)}"


def content_words(scene: Scene) -> str:
    """Subjects and background."""
    what = " and ".join(noun(p.subject) for p in scene.placed)
    return f"{what} {BACKGROUNDS[scene.background].phrase}"


def style_words(world: World, scene: Scene) -> str:
    """The style as captions name it: the rendering's name if there is one, else the drawing set's."""
    return world.renderings[scene.rendering] if scene.rendering else world.sets[scene.drawing_set]


def described(placed: Placed) -> str:
    """A subject with what is unusual about its size, tilt and place."""
    size = "small " if placed.side < SMALL else "large " if placed.side > LARGE else ""
    tilt = "tilted " if abs(placed.angle) > TILTED else ""
    return f"{noun(placed.subject, size + tilt)}{_position(placed)}"


def noun(subject: str, adjectives: str = "") -> str:
    """A subject with its article: "an ant", "a small bus", "large cherries"."""
    name = adjectives + words(subject)
    if subject.endswith("s") and subject not in SINGULAR_IN_S:
        return name
    return f"an {name}" if name[0] in "aeio" and not name.startswith("one") else f"a {name}"


def _position(placed: Placed) -> str:
    """Where a subject is; nothing is said of the centre."""
    across, down = placed.x - 0.5, placed.y - 0.5
    if max(abs(across), abs(down)) < OFF_CENTRE:
        return ""
    if abs(across) > abs(down):
        return " on the left" if across < 0 else " on the right"
    return " at the top" if down < 0 else " at the bottom"

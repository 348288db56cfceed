"""What Pocket USO learns from: a subject, a style picture, and the subject drawn in that style.

The drawing sets and renderings give triplets for free: content (a subject in style A), style (another
subject in style B), target (the first subject in style B). The USO paper (arXiv 2508.18966, section 3.1)
trains a stylisation and a de-stylisation expert to make them. As there, targets keep the content's layout or
have one of their own. `draw_triplet` decides, `cache_triplets` encodes once, `TripletSet` gives batches.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from usoflow.models.style_projector import LEVELS
from usoflow.models.vae import AutoEncoder
from usoflow.models.vision import SiglipVision, preprocess
from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.drawings import Sprites
from usoflow.training.kept import fingerprint, whole
from usoflow.training.latents import encoded, encoded_scenes, held, require_same
from usoflow.training.loop import CPU
from usoflow.training.painting import paint
from usoflow.training.scenes import (
    Placed,
    Scene,
    alone,
    described,
    generator,
    noun,
    pictures_of,
    style_words,
)
from usoflow.training.sheets import contact_sheet
from usoflow.training.world import World

Use = Literal["subject", "style", "both", "text"]
USES: tuple[Use, ...] = ("subject", "style", "both", "text")
STYLED: tuple[Use, ...] = ("style", "both")  # those with a style picture
PICTURED: tuple[Use, ...] = ("subject", "both")  # those with a content picture
RENDERED, LOOKED = 0.45, 0.4  # of the style pictures
CONTENT_RENDERED, CONTENT_LOOKED = 0.25, 0.1
CONTENT_SIDES = (0.5, 0.75)  # of a subject on a content picture, in whose middle it is
SAME_LAYOUT_CHANCE = 0.35
ALIKE = 0.1
# Where a target shows the subject: as it is, one token further, where the prompt tells; as and where it is;
# or anywhere, of any size and angle. A small transformer learns first what it can take over token by token.
SHIFTED_CHANCE, KEPT_CHANCE = 0.65, 0.2
TOKEN = 1 / 8  # side of a token, as a fraction of the side of a pocket picture
PLACE_TOLD_CHANCE = 0.5


@dataclass(frozen=True, slots=True)
class Styles:
    """Styles to draw from.

    Attributes:
        sets, renderings: their names.
        rendered: chance of a rendering; otherwise a drawing set as it is.
        looked: chance of a random look over it.
    """

    sets: tuple[str, ...]
    renderings: tuple[str, ...]
    rendered: float
    looked: float = 0.0

    def give(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """The scene in one of the styles."""
        drawing_set = self.sets[int(rng.integers(len(self.sets)))]
        rendering = self.renderings[int(rng.integers(len(self.renderings)))]
        rendered, looked = rng.random() < self.rendered, rng.random() < self.looked
        return dataclasses.replace(
            scene,
            drawing_set=drawing_set,
            rendering=rendering if rendered else None,
            look=int(rng.integers(2**62)) if looked else None,
        )


@dataclass(frozen=True, slots=True)
class Cast:
    """Who and what appears in lessons.

    Attributes:
        subjects: of content and target.
        others: subjects of style pictures.
        content, style: styles of content and style pictures.
        alike: chance that, given both, the style picture has the content's style: nothing is to be changed.
    """

    subjects: tuple[str, ...]
    others: tuple[str, ...]
    content: Styles
    style: Styles
    alike: float = 0.0


def seen_styles(world: World, rendered: float, looked: float = 0.0) -> Styles:
    """The styles that training shows."""
    return Styles(world.seen_sets, world.seen_renderings, rendered, looked)


def lesson_cast(world: World, use: Use) -> Cast:
    """Of the lessons: seen subjects and styles. What the base must know by name is of the core."""
    subjects = world.core if use in ("style", "text") else world.lesson_subjects
    content = seen_styles(world, CONTENT_RENDERED, CONTENT_LOOKED)
    return Cast(subjects, world.lesson_subjects, content, seen_styles(world, RENDERED, LOOKED), ALIKE)


@dataclass(frozen=True, slots=True)
class Triplet:
    """One lesson.

    Attributes:
        use: which of content and style the model is given; without a style picture, the target has the
            content's style.
        content, style, target: scenes.
        prompt: subject and background of the target, no style; empty for some targets of the same layout.
    """

    use: Use
    content: Scene
    style: Scene
    target: Scene
    prompt: str


def draw_triplet(cast: Cast, seed: int, index: int, use: Use) -> Triplet:
    """Lesson number `index`."""
    rng = generator(seed, index)
    subject = cast.subjects[int(rng.integers(len(cast.subjects)))]
    others = [name for name in cast.others if name != subject]
    other = others[int(rng.integers(len(others)))]
    centred = dataclasses.replace(alone(subject, rng, sides=CONTENT_SIDES), x=0.5, y=0.5)
    content = cast.content.give(_scene(centred, rng), rng)
    style = cast.style.give(_scene(alone(other, rng), rng), rng)
    placed, told = alone(subject, rng), rng.random() < PLACE_TOLD_CHANCE
    layout = generator(seed + 1, index)
    same_layout = use == "both" and layout.random() < SAME_LAYOUT_CHANCE
    if use in PICTURED:
        placed, told = _laid_out(centred, placed, layout)
    silent = same_layout and layout.random() < 0.5
    if use == "both" and layout.random() < cast.alike:
        style = in_style_of(style, content)
    shown = content if same_layout else _scene(placed, rng)
    hand = content if use == "subject" else style
    if use == "both" and (style.rendering or style.look is not None):
        # The drawing set under a rendering or a look can hardly be seen: the content's own drawing gets it.
        hand = dataclasses.replace(style, drawing_set=content.drawing_set)
    target = in_style_of(shown, hand)
    prompt = "" if silent else prompt_of(target, told=told and not same_layout)
    return Triplet(use, content, style, target, prompt)


def in_style_of(scene: Scene, other: Scene) -> Scene:
    """A scene as the hand of another drew it."""
    return dataclasses.replace(
        scene, drawing_set=other.drawing_set, rendering=other.rendering, look=other.look
    )


def _laid_out(centred: Placed, other: Placed, rng: np.random.Generator) -> tuple[Placed, bool]:
    """Where the target shows a subject, and whether the prompt tells it; a kept subject is not mirrored."""
    kind = rng.random()
    if kind < SHIFTED_CHANCE:
        across, down = ((TOKEN, 0), (-TOKEN, 0), (0, TOKEN), (0, -TOKEN))[int(rng.integers(4))]
        return dataclasses.replace(centred, x=0.5 + across, y=0.5 + down), True
    if kind < SHIFTED_CHANCE + KEPT_CHANCE:
        return centred, False
    return dataclasses.replace(other, mirrored=centred.mirrored), bool(rng.random() < PLACE_TOLD_CHANCE)


def prompt_of(scene: Scene, *, told: bool) -> str:
    """Subject and background, and the subject's size and place where that is `told`; no style."""
    placed = scene.placed[0]
    what = described(placed) if told else noun(placed.subject)
    return f"{what} {BACKGROUNDS[scene.background].phrase}"


def _scene(placed: Placed, rng: np.random.Generator) -> Scene:
    """A subject on a random background; the style is given later."""
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    return Scene((placed,), "", None, background, int(rng.integers(2**62)))


@dataclass(frozen=True)
class TripletSet:
    """Encoded lessons of one use.

    Attributes:
        folder: of `target.npy` and, where the use has them, `content.npy` (model latents, float16
            [N, 16, h, w]), `style.npy` (pictures, uint8 [N, S, S, 3]) and `states.npy` (of these, float16
            [N, 3, patches, dim], from high to low); `prompts.json`, `styles.json`.
        device: where rows are given.
        resident: whether on a GPU all that is asked for is held there; else it stays in the file.
    """

    folder: Path
    device: torch.device = CPU
    resident: bool = True

    @functools.cached_property
    def prompts(self) -> list[str]:
        return self._texts("prompts")

    @functools.cached_property
    def styles(self) -> list[str]:
        """What captions call the targets' styles; empty where a random look lies over one."""
        return self._texts("styles")

    def rows(self, name: str, indices: npt.NDArray[np.int64]) -> Tensor:
        """Rows of `content`, `target`, `style` or `states`, float32."""
        where = self.device if self.resident else CPU
        rows = torch.from_numpy(indices).to(where)
        return held(self.folder / f"{name}.npy", where)[rows].to(self.device).float()

    def pictures(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Style pictures, float32 [B, S, S, 3] in 0..1."""
        return self.rows("style", indices) / 255

    def states(self, indices: npt.NDArray[np.int64]) -> Mapping[int, Tensor]:
        """Hidden states of the style pictures, as the projector takes them."""
        levels = self.rows("states", indices).unbind(1)
        return MappingProxyType(dict(zip(LEVELS.values(), levels, strict=True)))

    @functools.cached_property
    def named(self) -> npt.NDArray[np.int64]:
        """The lessons whose target's style has a name."""
        return np.flatnonzero(self.styles)

    def told(self, indices: npt.NDArray[np.int64]) -> list[str]:
        """The prompts of some lessons with the names of their styles."""
        return [", ".join(filter(None, (self.prompts[i], self.styles[i]))) for i in indices]

    def _texts(self, name: str) -> list[str]:
        texts: list[str] = json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        return texts


@dataclass(frozen=True)
class Encoders:
    """The frozen networks through which lessons are seen, and the side of the pictures they make."""

    vae: AutoEncoder
    tower: SiglipVision
    sprites: Sprites
    side: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def fingerprint(self, use: Use, seed: int) -> str:
        """Of what is encoded for a use."""
        tower = [self.tower] if use in STYLED else []
        return fingerprint(self.vae, *tower, self.side, seed, str(self.dtype))

    def latents(self, scenes: Sequence[Scene], path: Path) -> None:
        """Write model latents, [N, 16, h, w]."""
        encoded_scenes(self.vae, self.sprites, scenes, self.side, path, dtype=self.dtype, device=self.device)

    def states(self, scenes: Sequence[Scene], pictures: Path, path: Path) -> None:
        """Write the pictures of scenes, which rewards compare with, and the tower's states of them."""
        drawn = paint(self.sprites, scenes, self.side, pictures)
        encoded(drawn, functools.partial(style_states, self.tower), path, self.device)


def cache_triplets(
    encoders: Encoders, folder: Path, *, cast: Cast, use: Use, seed: int, count: int
) -> TripletSet:
    """Encode lessons 0 to `count` of a use, unless they are there.

    Raises:
        UsoflowError: "training_config" if there are more or fewer, or of other networks or settings;
            "output_unwritable".
    """
    if not (folder / "styles.json").exists():  # it is written last
        folder.mkdir(parents=True, exist_ok=True)
        triplets = [draw_triplet(cast, seed, i, use) for i in range(count)]
        encoders.latents([t.target for t in triplets], folder / "target.npy")
        if use in PICTURED:
            encoders.latents([t.content for t in triplets], folder / "content.npy")
        if use in STYLED:
            encoders.states([t.style for t in triplets], folder / "style.npy", folder / "states.npy")
        world = encoders.sprites.world
        styles = [style_words(world, t.target) if t.target.look is None else "" for t in triplets]
        for name, texts in (("prompts", [t.prompt for t in triplets]), ("styles", styles)):
            with whole(folder / f"{name}.json") as partial:
                partial.write_text(json.dumps(texts), "utf-8")
    found = TripletSet(folder, encoders.device)
    require_same(folder, count, encoders.fingerprint(use, seed))
    return found


@torch.no_grad()
def style_states(tower: SiglipVision, pictures: Tensor) -> Tensor:
    """Pictures [B, S, S, 3] -> hidden states of USO's three levels, [B, 3, patches, dim]."""
    hidden = tower(preprocess(pictures, tower.config.image_size), list(LEVELS.values())).hidden
    return torch.stack([hidden[layer] for layer in LEVELS.values()], dim=1)


def lesson_sheet(
    path: Path, sprites: Sprites, lessons: Sequence[Triplet], made: Tensor, *, columns: int
) -> None:
    """Write four pictures for each lesson: content, style, target, and what was made [N, S, S, 3]."""
    scenes = [scene for t in lessons for scene in (t.content, t.style, t.target)]
    real = pictures_of(sprites, scenes, made.shape[1]).unflatten(0, (len(lessons), 3))
    rows = torch.cat([real, made[:, None]], dim=1).flatten(0, 1)
    labels = [text for t in lessons for text in ("content", "style", t.prompt or "(no prompt)", "made")]
    contact_sheet(path, list(rows.numpy()), labels, columns=columns, zoom=1)

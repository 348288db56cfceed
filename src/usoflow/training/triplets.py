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
from usoflow.models.vae import AutoEncoder, LatentFormat
from usoflow.models.vision import SiglipVision, preprocess
from usoflow.training.autoencoder import encode
from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.captions import CaptionTokenizer, Ids
from usoflow.training.drawings import Sprites
from usoflow.training.scenes import Scene, alone, generator, noun, pictures_of
from usoflow.training.world import World

Use = Literal["subject", "style", "both", "text"]
USES: tuple[Use, ...] = ("subject", "style", "both", "text")
CHUNK = 32
RENDERING_CHANCE = 0.45  # of a style; otherwise a drawing set as it is
SAME_LAYOUT_CHANCE = 0.3
STATES = "states.npy"


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


def draw_triplet(world: World, seed: int, index: int, use: Use) -> Triplet:
    """Lesson number `index`. What the base must know by name ("style", "text") is of the core."""
    rng = generator(seed, index)
    subjects = world.core if use in ("style", "text") else world.seen_subjects
    subject, other = (subjects[int(i)] for i in rng.choice(len(subjects), 2, replace=False))
    content = draw_style(world, _scene(world, subject, rng), rng)
    style = draw_style(world, _scene(world, other, rng), rng)
    same_layout = use == "both" and rng.random() < SAME_LAYOUT_CHANCE
    target = content if same_layout else _scene(world, subject, rng)
    source = content if use == "subject" else style
    target = dataclasses.replace(target, drawing_set=source.drawing_set, rendering=source.rendering)
    silent = same_layout and rng.random() < 0.5
    return Triplet(use, content, style, target, "" if silent else plain_prompt(target))


def plain_prompt(scene: Scene) -> str:
    """Subject and background, no style."""
    return f"{noun(scene.placed[0].subject)} {BACKGROUNDS[scene.background].phrase}"


def draw_style(world: World, scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene in a style drawn at random from the seen ones."""
    drawing_set = world.seen_sets[int(rng.integers(len(world.seen_sets)))]
    rendering = world.seen_renderings[int(rng.integers(len(world.seen_renderings)))]
    rendered = rng.random() < RENDERING_CHANCE
    return dataclasses.replace(scene, drawing_set=drawing_set, rendering=rendering if rendered else None)


def _scene(world: World, subject: str, rng: np.random.Generator) -> Scene:
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    return Scene((alone(subject, rng),), world.seen_sets[0], None, background, int(rng.integers(2**62)))


@dataclass(frozen=True)
class TripletSet:
    """Encoded lessons of one use.

    Attributes:
        folder: of `content.npy`, `target.npy` (model latents, float16 [N, 16, h, w]), `states.npy` (float16
            [N, 3, patches, dim], from high to low) and `prompts.json`.
    """

    folder: Path

    @functools.cached_property
    def prompts(self) -> list[str]:
        texts: list[str] = json.loads((self.folder / "prompts.json").read_text("utf-8"))
        return texts

    def rows(self, name: str, indices: npt.NDArray[np.int64]) -> Tensor:
        """Rows of `content`, `target` or `states`, float32."""
        return torch.from_numpy(self._stored[name][indices].astype(np.float32))

    def states(self, indices: npt.NDArray[np.int64]) -> Mapping[int, Tensor]:
        """Hidden states of the style pictures, as the projector takes them."""
        levels = self.rows("states", indices).unbind(1)
        return MappingProxyType(dict(zip(LEVELS.values(), levels, strict=True)))

    def ids(self, tokenizer: CaptionTokenizer) -> tuple[Ids, Ids]:
        """T5 and CLIP ids of all prompts."""
        return tokenizer.t5(self.prompts), tokenizer.clip(self.prompts)

    @functools.cached_property
    def _stored(self) -> Mapping[str, npt.NDArray[np.float16]]:
        names = ("content", "target", "states")
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names}


@dataclass(frozen=True)
class Encoders:
    """The frozen networks through which lessons are seen."""

    vae: AutoEncoder
    tower: SiglipVision
    sprites: Sprites
    side: int


def cache_triplets(encoders: Encoders, folder: Path, *, use: Use, seed: int, count: int) -> TripletSet:
    """Encode lessons 0 to `count` of a use, unless they are there."""
    if not (folder / "prompts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        world = encoders.sprites.world
        triplets = [draw_triplet(world, seed, i, use) for i in range(count)]
        starts = range(0, count, CHUNK)
        parts = [encode_triplets(encoders, triplets[i : i + CHUNK]) for i in starts]
        for name, rows in zip(("content", "target", "states"), zip(*parts, strict=True), strict=True):
            np.save(folder / f"{name}.npy", torch.cat(rows).numpy().astype(np.float16))
        (folder / "prompts.json").write_text(json.dumps([t.prompt for t in triplets]), "utf-8")
    return TripletSet(folder)


@torch.no_grad()
def encode_triplets(encoders: Encoders, triplets: Sequence[Triplet]) -> tuple[Tensor, Tensor, Tensor]:
    """Content and target latents [B, 16, h, w] and style states [B, 3, patches, dim]."""
    sprites, side = encoders.sprites, encoders.side
    pictures = (pictures_of(sprites, [t.content for t in triplets], side),
                pictures_of(sprites, [t.target for t in triplets], side))  # fmt: skip
    content, target = (LatentFormat().to_model(encode(encoders.vae, part)) for part in pictures)
    style = pictures_of(sprites, [t.style for t in triplets], encoders.tower.config.image_size)
    return content, target, style_states(encoders.tower, style)


@torch.no_grad()
def style_states(tower: SiglipVision, pictures: Tensor) -> Tensor:
    """Pictures [B, S, S, 3] -> hidden states of USO's three levels, [B, 3, patches, dim]."""
    hidden = tower(preprocess(pictures, tower.config.image_size), list(LEVELS.values())).hidden
    return torch.stack([hidden[layer] for layer in LEVELS.values()], dim=1)

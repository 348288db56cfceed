"""Content reward: is the subject of a made picture the one that was asked for?

The paper rewards style alone (arXiv 2508.18966, section 3.3), and there the style's reward costs the
subject (docs/pocket.md). Stage `content` trains an encoder that names the subjects of the lessons;
`ContentReward` asks it beside the style's, in the stage `rewarded`. The encoder looks where the subject ought
to be, and is a little wrong about that: so it learns shapes, not places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.training.drawings import Sprites
from usoflow.training.loop import LossFunction, Recipe, seeded, trained
from usoflow.training.painting import Pictures, painted, softened
from usoflow.training.reward import RewardStage
from usoflow.training.scenes import Placed, Scene, draw_scene, generator
from usoflow.training.triplets import LOOKED, RENDERED, Use, draw_triplet, lesson_cast, seen_styles
from usoflow.training.trunk import Trunk
from usoflow.training.world import World

CONTENT_SEED = 43  # of its scenes
SEEN_SIDE = 64  # pixels of what is cut out
MARGIN = 1.25  # sides of the subject that are cut out
WIDTHS = (32, 64, 128, 192)
FEATURES = 128
TEMPERATURE = 1 / 12  # of the cosines with the subjects' own vectors
BLUR = 1.2  # pixels: what is made in one step is soft
MISPLACED, MISSIZED = 0.06, 0.12  # deviations in sides, and of the logarithm of the side, in training
REWARD_MISPLACED, REWARD_MISSIZED = 0.04, 0.08  # the same, of what is made


class ContentEncoder(Trunk):
    """After the trunk, a linear layer to features; the vectors of the subjects name them."""

    def __init__(self, subjects: int) -> None:
        super().__init__(WIDTHS)
        self.project = nn.Linear(WIDTHS[-1] * (SEEN_SIDE >> len(WIDTHS)) ** 2, FEATURES)
        self.subjects = nn.Parameter(torch.randn(subjects, FEATURES))

    def forward(self, pictures: Tensor, places: Tensor) -> Tensor:
        """Logits of the subjects [B, subjects], for pictures [B, S, S, 3] in 0..1 and `places_of` them."""
        seen = self.at_each_size(cut_out(pictures, places) * 2 - 1)[-1]
        features = F.normalize(self.project(seen.flatten(1)), dim=-1)
        return features @ F.normalize(self.subjects, dim=-1).T / TEMPERATURE


def cut_out(pictures: Tensor, places: Tensor) -> Tensor:
    """The squares around places: [B, S, S, 3] and [B, 3] -> [B, 3, SEEN_SIDE, SEEN_SIDE]."""
    x, y, half = places[:, 0] * 2 - 1, places[:, 1] * 2 - 1, places[:, 2] * MARGIN
    nothing = torch.zeros_like(half)
    corners = torch.stack([half, nothing, x, nothing, half, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(corners, [len(pictures), 3, SEEN_SIDE, SEEN_SIDE], align_corners=False)
    return F.grid_sample(pictures.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)


def places_of(placed: Sequence[Placed]) -> Tensor:
    """Centres and sides of subjects as fractions of the picture's side: x, y, side, float32 [N, 3]."""
    return torch.tensor([[one.x, one.y, one.side] for one in placed], dtype=torch.float32)


def wrong_by(places: Tensor, rng: np.random.Generator, shift: float, scale: float) -> Tensor:
    """Places that are a little off: by deviations in sides, and of the logarithm of the side."""
    moved = torch.from_numpy(rng.normal(0, shift, (len(places), 2)).astype(np.float32))
    sized = torch.from_numpy(np.exp(rng.normal(0, scale, (len(places), 1))).astype(np.float32))
    side = places[:, 2:]
    return torch.cat([places[:, :2] + moved * side, side * sized], dim=1)


def content_scene(world: World, index: int) -> Scene:
    """Scene number `index` of the encoder's training: any subject and style of the lessons."""
    scene = draw_scene(world, CONTENT_SEED, index, world.lesson_subjects)
    return seen_styles(world, RENDERED, LOOKED).give(scene, generator(CONTENT_SEED + 1, index))


def train_content_encoder(sprites: Sprites, stage: RewardStage, folder: Path, *, side: int) -> ContentEncoder:
    """Run the stage to its end from wherever its folder is."""
    recipe, world = stage.recipe, sprites.world
    with seeded(recipe.seed):
        encoder = ContentEncoder(len(world.lesson_subjects))

    @contextmanager
    def lessons() -> Iterator[LossFunction]:
        scenes = [content_scene(world, i) for i in range(stage.drawn)]
        with painted(sprites, scenes, side, folder / "drawn.npy") as pictures:
            yield _loss(encoder, recipe, pictures, scenes, world)

    return trained(encoder, recipe, folder, lessons)


def _loss(
    encoder: ContentEncoder, recipe: Recipe, pictures: Pictures, scenes: Sequence[Scene], world: World
) -> LossFunction:
    """Which subject, of pictures as soft as those that are made; each of two in a scene counts."""
    shown = [(row, placed) for row, scene in enumerate(scenes) for placed in scene.placed]
    rows, subjects = np.array([row for row, _ in shown]), Subjects.of(world, [placed for _, placed in shown])

    def loss_of(done: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, done))
        chosen = rng.integers(len(shown), size=recipe.batch)
        soft = softened(pictures[rows[chosen]].astype(np.float32) / np.float32(255), rng, widest=BLUR)
        numbers, places = subjects[chosen]
        return F.cross_entropy(
            encoder(torch.from_numpy(soft), wrong_by(places, rng, MISPLACED, MISSIZED)), numbers
        )

    return loss_of


@dataclass(frozen=True)
class Subjects:
    """Which subjects some pictures show, and where.

    Attributes:
        numbers: among the subjects of the lessons, int64 [N].
        places: see `places_of`.
    """

    numbers: Tensor
    places: Tensor

    @classmethod
    def of(cls, world: World, placed: Sequence[Placed]) -> Self:
        number = {name: i for i, name in enumerate(world.lesson_subjects)}
        return cls(torch.tensor([number[one.subject] for one in placed]), places_of(placed))

    @classmethod
    def of_lessons(cls, world: World, use: Use, seed: int, count: int) -> Self:
        """Of the targets of a use's first lessons."""
        cast = lesson_cast(world, use)
        return cls.of(world, [draw_triplet(cast, seed, i, use).target.placed[0] for i in range(count)])

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        which = torch.from_numpy(indices)
        return self.numbers[which], self.places[which]


@dataclass(frozen=True)
class ContentReward:
    """Asks the encoder about pictures that were made for lessons."""

    encoder: ContentEncoder
    shown: Mapping[Use, Subjects]

    def loss(
        self, made: Tensor, use: Use, indices: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> Tensor:
        """Cross entropy of the subject that was asked for, mean over the batch.

        Args:
            made: [B, S, S, 3] in 0..1; gradients flow into them.
            use, indices: which lessons they are made for.
            rng: of how the places are wrong.
        """
        numbers, places = self.shown[use][indices]
        places = wrong_by(places, rng, REWARD_MISPLACED, REWARD_MISSIZED).to(made.device)
        return F.cross_entropy(self.encoder(made, places), numbers.to(made.device))

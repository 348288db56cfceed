"""Does the base draw what it is asked for? Numbers by an encoder that is used for nothing else.

`train_judge` trains a small classifier of subject and background on real scenes of its own seed; `measure`
lets it look at pictures made from a fixed prompt list: is the named subject the likeliest of 100, is the
named background the likeliest of all. Beside it stand the ceiling (real pictures of the same prompts)
and chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.drawings import Sprites
from usoflow.training.loop import Recipe, seeded, trained
from usoflow.training.scenes import Scene, draw_calm_scene, draw_scene, full_caption, pictures_of

JUDGE_SEED = 990_001  # of the judge's scenes: no other stage draws from it
PROMPT_SEED = 990_002  # of the prompts and of their real pictures
GALLERY = 100
SEEN_SIDE = 64  # pixels at which the judge looks
WIDTHS = (24, 48, 96, 192)


class Judge(nn.Module):
    """Strided convolutions and two linear classifiers; plain torch, as it is no model of the package."""

    def __init__(self, subjects: int, backgrounds: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 5 if before == 3 else 3, stride=2, padding=1 + (before == 3))]
            layers += [nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, padding=1), nn.GroupNorm(8, WIDTHS[-1]), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.subject = nn.Linear(2 * WIDTHS[-1], subjects)
        self.background = nn.Linear(2 * WIDTHS[-1], backgrounds)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, S, 3] in 0..1 -> logits of subjects and of backgrounds; larger pictures are shrunk."""
        small = F.interpolate(images.permute(0, 3, 1, 2), size=SEEN_SIDE, mode="area")
        x = self.features(small * 2 - 1).flatten(2)  # [B, C, 16]
        pooled = torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)
        return self.subject(pooled), self.background(pooled)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, the scene that answers it, and the right answers as class numbers."""

    prompt: str
    scene: Scene
    subject: int
    background: int


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of right answers, 0..1, among `count` pictures."""

    subject: float
    background: float
    count: int


def single_scene(sprites: Sprites, seed: int, index: int) -> Scene:
    """The first scene with one core subject at or after a number (they are spaced so none is met twice)."""
    for offset in range(50):
        scene = draw_scene(sprites.world, seed, index * 50 + offset, sprites.world.core)
        if len(scene.placed) == 1:
            return scene
    raise AssertionError("fifty pairs in a row")


def answers(sprites: Sprites, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Class numbers of subjects (of the core) and backgrounds."""
    core, backgrounds = sprites.world.core, list(BACKGROUNDS)
    subjects = [core.index(scene.placed[0].subject) for scene in scenes]
    return torch.tensor(subjects), torch.tensor([backgrounds.index(s.background) for s in scenes])


def train_judge(sprites: Sprites, recipe: Recipe, folder: Path) -> Judge:
    """Train the judge to the recipe's end, from wherever its folder is."""
    with seeded(recipe.seed):
        judge = Judge(len(sprites.world.core), len(BACKGROUNDS))

    def loss_of(done: int) -> Tensor:
        scenes = [single_scene(sprites, JUDGE_SEED, done + i) for i in range(recipe.batch)]
        subject, background = judge(pictures_of(sprites, scenes, SEEN_SIDE))
        right = answers(sprites, scenes)
        return F.cross_entropy(subject, right[0]) + F.cross_entropy(background, right[1])

    return trained(judge, recipe, folder, lambda: nullcontext(loss_of))


def questions(sprites: Sprites, count: int) -> list[Question]:
    """A fixed prompt list: a subject, a background and a seen style; calm scenes answer it."""
    scenes = [draw_calm_scene(sprites.world, PROMPT_SEED, i, sprites.world.core) for i in range(count)]
    pairs = zip(*answers(sprites, scenes), strict=True)
    return [
        Question(full_caption(sprites.world, scene), scene, int(subject), int(background))
        for scene, (subject, background) in zip(scenes, pairs, strict=True)
    ]


@torch.no_grad()
def measure(judge: Judge, asked: Sequence[Question], images: Tensor) -> Score:
    """How often the judge finds the named subject first among 100 and the named background first of all."""
    subject, background = judge(images)
    gallery = _galleries(subject.shape[1], [q.subject for q in asked])
    found = subject.gather(1, gallery).argmax(dim=1) == 0  # the right one is each gallery's first
    right = background.argmax(dim=1) == torch.tensor([q.background for q in asked])
    return Score(round(float(found.float().mean()), 4), round(float(right.float().mean()), 4), len(asked))


def _galleries(subjects: int, right: Sequence[int]) -> Tensor:
    """[N, 100]: the right subject, then 99 others drawn with a fixed seed."""
    rng = np.random.default_rng(PROMPT_SEED)
    rows: list[npt.NDArray[np.int64]] = []
    for subject in right:
        others = rng.permutation([i for i in range(subjects) if i != subject])
        rows.append(np.concatenate([[subject], others[: GALLERY - 1]]))
    return torch.from_numpy(np.stack(rows))


def report(path: Path, scores: dict[str, Score]) -> None:
    """Write the scores, with chance beside them, as JSON."""
    chance = {"subject": 1 / GALLERY, "background": round(1 / len(BACKGROUNDS), 4)}
    rows = {
        name: {"subject": s.subject, "background": s.background, "count": s.count}
        for name, s in scores.items()
    }
    path.write_text(json.dumps({"chance": chance} | rows, indent=1) + "\n", "utf-8")

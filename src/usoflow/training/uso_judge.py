"""The encoder that measures Pocket USO: whose subject, which style, what background, where and how large.

Trained on scenes of its own seed, held-out subjects and styles included, and used for nothing else: it is
neither the reward nor a part of the model. `uso_evaluate` asks it. The trained one is package data, so that
everybody measures with the same.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.drawings import Sprites
from usoflow.training.kept import write_tensors
from usoflow.training.loop import LossFunction, Recipe, seeded, trained
from usoflow.training.package import stored
from usoflow.training.painting import softened
from usoflow.training.scenes import Scene, alone, generator, pictures_of
from usoflow.training.trunk import Trunk
from usoflow.training.world import World

FILE = "uso-judge.safetensors"
USO_JUDGE_SEED = 990_003  # of its scenes: no other stage draws from it
SEEN_SIDE = 96  # pixels at which the judge looks
WIDTHS = (32, 64, 128, 256)
BLUR = 1.0  # of half of its pictures, by up to so many pixels
LAYOUT_WEIGHT = 20.0  # of squared fractions of the side, beside logarithms


def styles_of(world: World) -> tuple[str, ...]:
    """All styles: drawing sets, then renderings."""
    return (*world.sets, *world.renderings)


def style_name(scene: Scene) -> str:
    """The style that one sees: the rendering's if there is one, else the drawing set's."""
    return scene.rendering or scene.drawing_set


def known_subjects(world: World) -> tuple[str, ...]:
    """Who the judge knows: the gallery of held-out subjects first, then the core."""
    return (*world.gallery, *world.core)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in pictures.

    Attributes:
        subject: logits [B, gallery + core].
        style: logits [B, styles].
        background: logits [B, backgrounds].
        layout: x, y and side of the subject as fractions of the picture's side, [B, 3].
    """

    subject: Tensor
    style: Tensor
    background: Tensor
    layout: Tensor


class UsoJudge(Trunk):
    """After the trunk, four linear readings."""

    def __init__(self, world: World) -> None:
        super().__init__(WIDTHS)
        sizes = (len(known_subjects(world)), len(styles_of(world)), len(BACKGROUNDS), 3)
        total = 2 * WIDTHS[-1] + 2 * WIDTHS[1] + 16 * (SEEN_SIDE // 16) ** 2
        self.place = nn.Conv2d(WIDTHS[-1], 16, 1)
        self.readings = nn.ModuleList(nn.Linear(total, size) for size in sizes)

    def forward(self, pictures: Tensor) -> Verdict:
        """[B, S, S, 3] in 0..1; larger pictures are shrunk."""
        x = F.interpolate(pictures.permute(0, 3, 1, 2), size=SEEN_SIDE, mode="area") * 2 - 1
        seen = self.at_each_size(x)
        # Texture, and content.
        found = [y for x in (seen[1], seen[-1]) for y in (x.mean(dim=(2, 3)), x.amax(dim=(2, 3)))]
        told = torch.cat([*found, self.place(seen[-1]).flatten(1)], dim=1)
        return Verdict(*(reading(told) for reading in self.readings))


def judge_scene(world: World, index: int) -> Scene:
    """Scene number `index` of the judge's training: any subject it knows, any style, anywhere."""
    rng = generator(USO_JUDGE_SEED, index)
    gallery = rng.random() < 0.6
    pool, backgrounds = (world.gallery if gallery else world.core), list(BACKGROUNDS)
    rendering = list(world.renderings)[int(rng.integers(len(world.renderings)))]
    return Scene(
        (alone(pool[int(rng.integers(len(pool)))], rng),),
        list(world.sets)[int(rng.integers(len(world.sets)))],
        rendering if rng.random() < 0.5 else None,
        backgrounds[int(rng.integers(len(backgrounds)))],
        int(rng.integers(2**62)),
    )


def layout_of(scene: Scene) -> tuple[float, float, float]:
    """x, y and side of a scene's subject."""
    placed = scene.placed[0]
    return placed.x, placed.y, placed.side


def train_uso_judge(sprites: Sprites, recipe: Recipe, folder: Path) -> UsoJudge:
    """Train the judge to the recipe's end, from wherever its folder is."""
    with seeded(recipe.seed):
        judge = UsoJudge(sprites.world)
    return trained(judge, recipe, folder, lambda: nullcontext(_loss(judge, sprites, recipe)))


def write_uso_judge(judge: UsoJudge, folder: Path) -> None:
    """Write a trained judge as the package holds it, in fp16."""
    write_tensors(folder / FILE, stored(dict(judge.named_parameters())))


def shipped_uso_judge(world: World) -> UsoJudge:
    """The judge that is package data; its answers have the names of the shipped world."""
    judge = UsoJudge(world)
    held = load(resources.files("usoflow.training").joinpath(FILE).read_bytes())
    judge.load_state_dict({name: value.float() for name, value in held.items()})
    return judge.eval()


def _loss(judge: UsoJudge, sprites: Sprites, recipe: Recipe) -> LossFunction:
    world, backgrounds = sprites.world, list(BACKGROUNDS)
    subjects, styles = known_subjects(world), styles_of(world)

    def loss_of(done: int) -> Tensor:
        scenes = [judge_scene(world, done + i) for i in range(recipe.batch)]
        pictures = pictures_of(sprites, scenes, SEEN_SIDE).numpy()
        soft = softened(pictures, np.random.default_rng((USO_JUDGE_SEED, done)), widest=BLUR)
        verdict = judge(torch.from_numpy(soft))
        right = [
            torch.tensor([subjects.index(scene.placed[0].subject) for scene in scenes]),
            torch.tensor([styles.index(style_name(scene)) for scene in scenes]),
            torch.tensor([backgrounds.index(scene.background) for scene in scenes]),
        ]
        said = (verdict.subject, verdict.style, verdict.background)
        told = [F.cross_entropy(*pair) for pair in zip(said, right, strict=True)]
        place = F.mse_loss(verdict.layout, torch.tensor([layout_of(scene) for scene in scenes]))
        return torch.stack([*told, LAYOUT_WEIGHT * place]).sum()

    return loss_of

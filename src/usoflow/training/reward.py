"""Style reward learning: how near a made picture's style is to that of the style picture.

Stage `reward` trains a small style encoder on real scenes; `StyleReward` compares with it, differentiably,
and serves the stages of `uso`. Method: arXiv 2508.18966, section 3.3, whose style encoder is CSD; ours tells
drawing sets and renderings apart. What tells drawing sets apart are exact colours, and networks learn last
what varies fast with their input (arXiv 1806.08734); so the encoder is given waves of the colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.models.latent_format import LatentFormat
from usoflow.models.vae import AutoEncoder
from usoflow.training.colours import waves_of
from usoflow.training.drawings import Sprites
from usoflow.training.loop import LossFunction, Recipe, seeded, trained
from usoflow.training.painting import Pictures, painted, softened
from usoflow.training.scenes import Scene, draw_scene, generator
from usoflow.training.triplets import RENDERED, seen_styles
from usoflow.training.world import World

REWARD_SEED = 41  # of its scenes
COLOUR_WIDTH = 32
WIDTHS = (32, 48, 64, 128)
FEATURES = 64
OCTAVES = (0, 1, 2, 3)  # of the waves of colours
TEMPERATURE = 1 / 16  # of the cosines with the styles' own vectors
BLUR = 1.6  # pixels: what is made in one step is soft
GRAIN = 0.03


@dataclass(frozen=True, slots=True)
class RewardStage:
    """What the sections `reward` and `content` of a training file say, of their encoders.

    Attributes:
        recipe: length and speed.
        drawn: pictures, of which batches are chosen at random.
    """

    recipe: Recipe
    drawn: int = 60_000

    def __post_init__(self) -> None:
        """Raises ValueError where there is nothing to learn from."""
        if self.drawn < 1:
            raise ValueError("drawn must be at least 1")


class StyleEncoder(nn.Module):
    """Waves of colours, then strided convolutions; means and deviations of all channels.

    They tell texture and colour, not place. The vectors of the styles themselves are for training alone.
    """

    def __init__(self, styles: int) -> None:
        super().__init__()
        colours = 3 + 6 * len(OCTAVES)
        pairs = zip((COLOUR_WIDTH, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.colours = nn.Conv2d(colours, COLOUR_WIDTH, 1)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in WIDTHS)
        self.project = nn.Linear(2 * (COLOUR_WIDTH + sum(WIDTHS)), FEATURES)
        self.styles = nn.Parameter(torch.randn(styles, FEATURES))

    def forward(self, pictures: Tensor, *, first: tuple[int, int] = (0, 0)) -> Tensor:
        """Pictures, [B, S, S, 3] in 0..1 -> unit vectors [B, 64].

        Every second pixel is looked at, down and across, from `first` on: exact colours stay as they are
        there, and a quarter is enough of them.
        """
        down, across = first
        x = pictures[:, down::2, across::2].permute(0, 3, 1, 2) * 2 - 1
        x = F.silu(self.colours(torch.cat([x, *waves_of(x, OCTAVES)], dim=1)))
        found = [*_statistics(x)]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.silu(norm(layer(x)))
            found += _statistics(x)
        return F.normalize(self.project(torch.cat(found, dim=1)), dim=-1)

    def told(self, features: Tensor) -> Tensor:
        """Logits of the styles, [B, styles], for features [B, 64] (arXiv 1704.06369)."""
        return features @ F.normalize(self.styles, dim=-1).T / TEMPERATURE


def first_pixel(rng: np.random.Generator) -> tuple[int, int]:
    """Where the encoder begins to look: chosen anew each time, so that no pixel goes unseen."""
    return int(rng.integers(2)), int(rng.integers(2))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations of channels; no deviation is zero, where its gradient would have no end."""
    return x.mean(dim=(2, 3)), (x.var(dim=(2, 3)) + 1e-5).sqrt()


def style_scene(world: World, index: int) -> Scene:
    """Scene number `index` of the encoder's training: any seen subject in any seen style."""
    scene = draw_scene(world, REWARD_SEED, index)
    return seen_styles(world, RENDERED).give(scene, generator(REWARD_SEED + 1, index))


def train_style_encoder(sprites: Sprites, stage: RewardStage, folder: Path, *, side: int) -> StyleEncoder:
    """Run the stage to its end from wherever its folder is."""
    recipe, world = stage.recipe, sprites.world
    styles = (*world.seen_sets, *world.seen_renderings)
    with seeded(recipe.seed):
        encoder = StyleEncoder(len(styles))

    @contextmanager
    def lessons() -> Iterator[LossFunction]:
        scenes = [style_scene(world, i) for i in range(stage.drawn)]
        numbers = torch.tensor([styles.index(scene.rendering or scene.drawing_set) for scene in scenes])
        with painted(sprites, scenes, side, folder / "drawn.npy") as pictures:
            yield _loss(encoder, recipe, pictures, numbers)

    return trained(encoder, recipe, folder, lessons)


def _loss(encoder: StyleEncoder, recipe: Recipe, pictures: Pictures, styles: Tensor) -> LossFunction:
    """Which style, of pictures as soft and grainy as those that are made."""

    def loss_of(done: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, done))
        rows = rng.integers(len(pictures), size=recipe.batch)
        soft = softened(pictures[rows].astype(np.float32) / np.float32(255), rng, widest=BLUR)
        grain = rng.standard_normal(soft.shape, np.float32) * rng.uniform(0, GRAIN, (len(rows), 1, 1, 1))
        seen = torch.from_numpy((soft + grain).clip(0, 1).astype(np.float32))
        return F.cross_entropy(
            encoder.told(encoder(seen, first=first_pixel(rng))), styles[torch.from_numpy(rows)]
        )

    return loss_of


@dataclass(frozen=True)
class StyleReward:
    """Compares latents with style pictures.

    Attributes:
        encoder: what compares.
        vae, dtype: what decodes, and in which precision.
        side: of the pictures that the encoder has learnt; it is shown larger ones at this size.
    """

    encoder: StyleEncoder
    vae: AutoEncoder
    dtype: torch.dtype
    side: int

    def loss(self, latents: Tensor, style_pictures: Tensor, *, first: tuple[int, int] = (0, 0)) -> Tensor:
        """1 - cosine of the features, mean over the batch.

        Args:
            latents: [B, 16, h, w] in the model's scale; gradients flow into them.
            style_pictures: [B, S, S, 3] in 0..1.
            first: see `first_pixel`.
        """
        return self.distance(self.decoded(latents), style_pictures, first=first)

    def decoded(self, latents: Tensor) -> Tensor:
        """Latents in the model's scale to pictures, [B, S, S, 3] in 0..1; gradients flow."""
        pixels = self.vae.decoder(LatentFormat().from_model(latents).to(self.dtype)).float()
        return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)

    def distance(self, made: Tensor, wanted: Tensor, *, first: tuple[int, int] = (0, 0)) -> Tensor:
        """What `loss` is of pictures, [B, S, S, 3] in 0..1."""
        return 1 - (self._features(made, first) * self._features(wanted, first)).sum(dim=1).mean()

    def _features(self, pictures: Tensor, first: tuple[int, int]) -> Tensor:
        """Unit vectors; larger pictures are seen at the encoder's side."""
        if pictures.shape[1] > self.side:
            small = F.interpolate(pictures.permute(0, 3, 1, 2), size=self.side, mode="area")
            pictures = small.permute(0, 2, 3, 1)
        features: Tensor = self.encoder(pictures, first=first)
        return features

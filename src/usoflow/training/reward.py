"""Style reward learning: how near a made picture's style is to that of the style picture.

Stage `reward` trains a small style encoder on real scenes; `StyleReward` compares with it, differentiably,
and serves the stages of `uso`. Method: arXiv 2508.18966, section 3.3, whose style encoder is CSD; ours tells
drawing sets and renderings apart, and its features, not its answers, are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.models.vae import AutoEncoder, LatentFormat
from usoflow.training.drawings import Sprites
from usoflow.training.loop import Recipe, Training, swap
from usoflow.training.scenes import Scene, draw_scene, generator, pictures_of
from usoflow.training.triplets import RENDERED, seen_styles
from usoflow.training.world import World

REWARD_SEED = 41  # of its scenes
WIDTHS = (16, 32, 64, 128)


class StyleEncoder(nn.Module):
    """Strided convolutions; means and deviations of their channels, which tell texture and not place."""

    def __init__(self, sets: int, renderings: int) -> None:
        super().__init__()
        pairs = zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in WIDTHS)
        self.project = nn.Linear(2 * sum(WIDTHS), 64)
        self.drawing_set, self.rendering = nn.Linear(64, sets), nn.Linear(64, renderings + 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, S, S, 3] in 0..1 -> features [B, 64]."""
        x = pictures.permute(0, 3, 1, 2) * 2 - 1
        found = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.silu(norm(layer(x)))
            found += [x.mean(dim=(2, 3)), x.std(dim=(2, 3))]
        features: Tensor = self.project(torch.cat(found, dim=1))
        return features


def style_scene(world: World, index: int) -> Scene:
    """Scene number `index` of the encoder's training: any seen subject in any seen style."""
    scene = draw_scene(world, REWARD_SEED, index)
    return seen_styles(world, RENDERED).give(scene, generator(REWARD_SEED + 1, index))


def train_style_encoder(sprites: Sprites, recipe: Recipe, folder: Path, *, side: int) -> StyleEncoder:
    """Run the stage to its end from wherever its folder is."""
    torch.manual_seed(recipe.seed)
    world = sprites.world
    sets, renderings = world.seen_sets, (None, *world.seen_renderings)
    encoder = StyleEncoder(len(sets), len(world.seen_renderings))
    training = Training(dict(encoder.named_parameters()), recipe, folder)
    training.resume()

    def loss_of(done: int) -> Tensor:
        scenes = [style_scene(world, done + i) for i in range(recipe.batch)]
        features = F.silu(encoder(pictures_of(sprites, scenes, side)))
        drawn = torch.tensor([sets.index(scene.drawing_set) for scene in scenes])
        rendered = torch.tensor([renderings.index(scene.rendering) for scene in scenes])
        told = F.cross_entropy(encoder.rendering(features), rendered)
        return told + F.cross_entropy(encoder.drawing_set(features), drawn)

    training.run(loss_of, after_save=lambda: None)
    swap(training.parameters, training.average)
    return encoder.requires_grad_(False)


@dataclass(frozen=True)
class StyleReward:
    """Compares latents with style pictures."""

    encoder: StyleEncoder
    vae: AutoEncoder

    def loss(self, latents: Tensor, style_pictures: Tensor) -> Tensor:
        """1 - cosine of the features, mean over the batch.

        Args:
            latents: [B, 16, h, w] in the model's scale; gradients flow into them.
            style_pictures: [B, S, S, 3] in 0..1.
        """
        pixels = self.vae.decoder(LatentFormat().from_model(latents))
        made = self.encoder(((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1))
        return 1 - F.cosine_similarity(made, self.encoder(style_pictures)).mean()

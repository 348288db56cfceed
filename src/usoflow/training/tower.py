"""Stage `tower`: train the pocket vision tower on pictures and their captions.

Trains `models.vision.SiglipVision` beside a small text encoder with the sigmoid loss of SigLIP (arXiv
2303.15343, equation 1): of all pairs of a batch, the pictures with their own captions belong together. Every
picture has two captions, what is shown and how it is drawn, for with a whole caption the subject alone tells
the pictures of a batch apart, and the style is hardly looked at. Only the tower's layers are kept; its head
and the text encoder are not part of USO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.models.text import T5Config, T5Encoder
from usoflow.models.vision import SiglipConfig, SiglipVision, preprocess
from usoflow.models.weights import LayerNorm, Linear
from usoflow.training.captions import CaptionTokenizer, Vocabulary
from usoflow.training.drawings import Sprites
from usoflow.training.initial import initialise
from usoflow.training.looks import look_words
from usoflow.training.loop import LossFunction, Recipe, Training, swap
from usoflow.training.scenes import Scene, content_words, draw_scene, generator, pictures_of, style_words
from usoflow.training.triplets import LOOKED, RENDERED, seen_styles
from usoflow.training.world import World

DATA_SEED = 31
FIRST_SCALE, FIRST_BIAS = 2.3, -10.0  # SigLIP's: logarithm of the temperature 10, and the bias


@dataclass(frozen=True, slots=True)
class TowerStage:
    """What the `tower` section of a training file says.

    Attributes:
        recipe: length and speed.
        dim, mlp_dim, layers, heads: of the tower; USO reads the output of the twentieth layer from the end.
        patch, grid: pixels of a patch's side, patches of a picture's side.
        text_length: tokens of a caption.
    """

    recipe: Recipe
    dim: int = 64
    mlp_dim: int = 128
    layers: int = 20
    heads: int = 2
    patch: int = 8
    grid: int = 8
    text_length: int = 24

    @property
    def config(self) -> SiglipConfig:
        return SiglipConfig(
            self.dim, self.mlp_dim, self.layers, self.heads, self.patch, self.grid, self.patch * self.grid
        )


class Contrast(nn.Module):
    """Tower and text encoder, each with a head into a common space, and the loss between them."""

    def __init__(self, stage: TowerStage, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary, self.tokenizer = vocabulary, CaptionTokenizer(stage.text_length, 16)
        dim = stage.dim
        text = T5Config(dim, dim, 2 * dim, 1, dim // 16, stage.text_length, vocabulary=len(vocabulary.rows))
        self.tower, self.text = SiglipVision(stage.config), T5Encoder(text)
        self.picture_norm, self.picture_head = LayerNorm(dim, 1e-5), Linear(dim, dim)
        self.text_norm, self.text_head = LayerNorm(dim, 1e-5), Linear(dim, dim)
        self.scale = nn.Parameter(torch.tensor(FIRST_SCALE))
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS))
        generator = torch.Generator().manual_seed(stage.recipe.seed)
        initialise(self, generator, zero=("self_attn.out_proj", "mlp.fc2"))

    def see(self, pictures: Tensor) -> Tensor:
        """[B, S, S, 3] in 0..1 -> unit vectors [B, dim]."""
        pixels = preprocess(pictures, self.tower.config.image_size)
        last = self.tower(pixels, [-1]).hidden[-1].mean(dim=1)
        return F.normalize(self.picture_head(self.picture_norm(last)), dim=-1)

    def read(self, captions: Sequence[str]) -> Tensor:
        """Captions -> unit vectors [B, dim]."""
        states = self.text(self.vocabulary.compact(self.tokenizer.t5(captions))).mean(dim=1)
        return F.normalize(self.text_head(self.text_norm(states)), dim=-1)

    def loss(self, pictures: Tensor, captions: Sequence[tuple[str, str]]) -> Tensor:
        """The sigmoid loss, per picture; captions that are the same text belong to each other's pictures."""
        texts = sorted({text for own in captions for text in own})
        logits = self.scale.exp() * self.see(pictures) @ self.read(texts).T + self.bias
        signs = torch.tensor([[1.0 if text in own else -1.0 for text in texts] for own in captions])
        return -F.logsigmoid(signs * logits).sum() / len(captions)


def tower_scene(world: World, index: int) -> Scene:
    """Scene number `index`: any subject and style of the lessons."""
    scene = draw_scene(world, DATA_SEED, index, world.lesson_subjects)
    return seen_styles(world, RENDERED, LOOKED).give(scene, generator(DATA_SEED + 1, index))


def captions_of(world: World, scene: Scene) -> tuple[str, str]:
    """What is shown, and how it is drawn."""
    style = style_words(world, scene)
    return content_words(scene), style if scene.look is None else f"{style}, {look_words(scene.look)}"


def train_tower(sprites: Sprites, stage: TowerStage, folder: Path) -> SiglipVision:
    """Run the stage to its end from wherever its folder is."""
    words = Vocabulary.of(CaptionTokenizer(stage.text_length, 16).t5(batch_captions(sprites, 20_000)))
    contrast = Contrast(stage, words)
    training = Training(dict(contrast.named_parameters()), stage.recipe, folder)
    training.resume()
    training.run(loss_function(contrast, sprites, stage.recipe), after_save=lambda: None)
    swap(training.parameters, training.average)
    return contrast.tower.requires_grad_(False)


def batch_captions(sprites: Sprites, count: int) -> list[str]:
    """Captions of the stage's first scenes: between them they hold every word."""
    scenes = (tower_scene(sprites.world, i) for i in range(count))
    return [text for scene in scenes for text in captions_of(sprites.world, scene)]


def loss_function(contrast: Contrast, sprites: Sprites, recipe: Recipe) -> LossFunction:
    """The loss of the batch that begins at a sample number."""
    world, side = sprites.world, contrast.tower.config.image_size

    def loss_of(done: int) -> Tensor:
        scenes = [tower_scene(world, done + i) for i in range(recipe.batch)]
        return contrast.loss(
            pictures_of(sprites, scenes, side), [captions_of(world, scene) for scene in scenes]
        )

    return loss_of

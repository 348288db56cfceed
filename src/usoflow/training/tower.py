"""Stage `tower`: train the pocket vision tower on pictures and their captions.

Trains `models.vision.SiglipVision` beside a small text encoder with the sigmoid loss of SigLIP (arXiv
2303.15343, equation 1): of all pairs of a batch, the pictures with their own captions belong together. Every
picture has two captions, what is shown and how it is drawn, for with a whole caption the subject alone tells
the pictures of a batch apart, and the style is hardly looked at. The loss is that of each of the three hidden
states that USO reads (deep supervision, arXiv 1409.5185), for from its end alone so narrow a tower of twenty
layers learns slowly. Its first two layers are set (`colours`). Only the tower's layers are kept; its heads
and the text encoder are not part of USO.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.models.style_projector import LEVELS
from usoflow.models.t5 import T5Config, T5Encoder
from usoflow.models.vision import SiglipConfig, SiglipVision, preprocess
from usoflow.models.weights import LayerNorm, Linear
from usoflow.training.captions import CaptionTokenizer, Vocabulary
from usoflow.training.colours import LEAST_DIM, know_colours
from usoflow.training.drawings import Sprites
from usoflow.training.initial import initialise
from usoflow.training.looks import look_words
from usoflow.training.loop import CPU, LossFunction, Recipe, trained
from usoflow.training.painting import Pictures, painted
from usoflow.training.scenes import Scene, content_words, draw_scene, generator, style_words
from usoflow.training.triplets import LOOKED, RENDERED, seen_styles
from usoflow.training.world import World

DATA_SEED = 31
WORDS_FROM = 20_000  # scenes whose captions make the vocabulary
FIRST_SCALE, FIRST_BIAS = 2.3, -10.0  # SigLIP's: logarithm of the temperature 10, and the bias
TEXT_HEAD = 16  # features of a head of the captions' encoder


@dataclass(frozen=True, slots=True)
class TowerStage:
    """What the `tower` section of a training file says.

    Attributes:
        recipe: length and speed.
        dim, mlp_dim, layers, heads: of the tower; USO reads the output of the twentieth layer from the end.
        patch, grid: pixels of a patch's side, patches of a picture's side.
        text_length: tokens of a caption.
        drawn: pictures, of which batches are chosen at random.
    """

    recipe: Recipe
    dim: int = 64
    mlp_dim: int = 128
    layers: int = 20
    heads: int = 2
    patch: int = 8
    grid: int = 8
    text_length: int = 24
    drawn: int = 60_000

    def __post_init__(self) -> None:
        """Raises ValueError for a tower without room for what its first layers are set to."""
        if self.dim < LEAST_DIM or self.layers <= -min(LEVELS.values()) - 1:
            raise ValueError(f"a tower needs {LEAST_DIM} features and {-min(LEVELS.values())} layers")
        if min(self.mlp_dim, self.heads, self.patch, self.grid, self.text_length, self.drawn) < 1:
            raise ValueError("mlp_dim, heads, patch, grid, text_length and drawn must be at least 1")
        if self.dim % self.heads or self.dim % TEXT_HEAD:
            raise ValueError(f"dim must be a multiple of heads and of {TEXT_HEAD}")

    @property
    def config(self) -> SiglipConfig:
        return SiglipConfig(
            self.dim, self.mlp_dim, self.layers, self.heads, self.patch, self.grid, self.patch * self.grid
        )


class Contrast(nn.Module):
    """Tower and text encoder, with heads into common spaces, one for each level; the loss between them."""

    def __init__(self, stage: TowerStage, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary, self.tokenizer = vocabulary, CaptionTokenizer(stage.text_length, 16)
        dim = stage.dim
        text = T5Config(
            dim, dim, 2 * dim, 1, dim // TEXT_HEAD, stage.text_length, vocabulary=len(vocabulary.rows)
        )
        self.tower, self.text = SiglipVision(stage.config), T5Encoder(text)
        self.picture_norms = nn.ModuleList(LayerNorm(dim, 1e-5) for _ in LEVELS)
        self.picture_heads = nn.ModuleList(Linear(dim, dim) for _ in LEVELS)
        self.text_norm, self.text_head = LayerNorm(dim, 1e-5), Linear(dim, dim)
        self.scales = nn.Parameter(torch.full((len(LEVELS), 1, 1), FIRST_SCALE))
        self.biases = nn.Parameter(torch.full((len(LEVELS), 1, 1), FIRST_BIAS))
        generator = torch.Generator().manual_seed(stage.recipe.seed)
        initialise(self, generator, zero=("self_attn.out_proj", "mlp.fc2"))
        know_colours(self.tower)
        self.tower.encoder.layers[-1].requires_grad_(False)  # which USO does not read

    def see(self, pictures: Tensor) -> Tensor:
        """[B, S, S, 3] in 0..1 -> unit vectors [levels, B, dim]."""
        hidden = self.tower(preprocess(pictures, self.tower.config.image_size), list(LEVELS.values())).hidden
        parts = zip(LEVELS.values(), self.picture_norms, self.picture_heads, strict=True)
        seen = [head(norm(hidden[level].mean(dim=1))) for level, norm, head in parts]
        return F.normalize(torch.stack(seen), dim=-1)

    def read(self, ids: Tensor) -> Tensor:
        """Captions, as rows of the vocabulary [B, T] -> unit vectors [B, dim]."""
        states = self.text(ids).mean(dim=1)
        return F.normalize(self.text_head(self.text_norm(states)), dim=-1)

    def loss(self, pictures: Tensor, texts: Tensor, ids: Tensor) -> Tensor:
        """The sigmoid loss, per picture, of all levels; captions of one text belong to each other's pictures.

        Args:
            pictures: [B, S, S, 3] in 0..1.
            texts: int64 [B, 2], the numbers of each picture's captions.
            ids: int64 [N, T], all captions by number.
        """
        numbers = texts.flatten()  # [2 B]
        logits = self.scales.exp() * (self.see(pictures) @ self.read(ids[numbers]).T) + self.biases
        own = (texts[:, :, None] == numbers).any(dim=1)  # [B, 2 B]
        once = 1 / (numbers[:, None] == numbers).sum(dim=0)  # a text that comes n times counts once
        return -(F.logsigmoid(torch.where(own, logits, -logits)) * once).sum() / len(pictures)


def tower_scene(world: World, index: int) -> Scene:
    """Scene number `index`: any subject and style of the lessons."""
    scene = draw_scene(world, DATA_SEED, index, world.lesson_subjects)
    return seen_styles(world, RENDERED, LOOKED).give(scene, generator(DATA_SEED + 1, index))


def captions_of(world: World, scene: Scene) -> tuple[str, str]:
    """What is shown, and how it is drawn."""
    style = style_words(world, scene)
    return content_words(scene), style if scene.look is None else f"{style}, {look_words(scene.look)}"


@dataclass(frozen=True)
class Captioned:
    """Pictures with two captions each; on the device where they are learnt.

    Attributes:
        pictures: uint8 [N, S, S, 3].
        texts: int64 [N, 2], the numbers of their captions.
        ids: int64 [M, T], the captions as rows of the vocabulary.
    """

    pictures: Tensor
    texts: Tensor
    ids: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], pictures: Pictures, contrast: Contrast, world: World) -> Captioned:
        """Scenes and what was drawn of them."""
        captions = [captions_of(world, scene) for scene in scenes]
        known = sorted({text for own in captions for text in own})
        number = {text: i for i, text in enumerate(known)}
        device = contrast.scales.device
        return cls(
            torch.from_numpy(pictures).to(device),
            torch.tensor([[number[text] for text in own] for own in captions], device=device),
            contrast.vocabulary.compact(contrast.tokenizer.t5(known)).to(device),
        )

    def loss(self, contrast: Contrast, recipe: Recipe, done: int) -> Tensor:
        """The loss of the batch that begins at a sample number."""
        chosen = np.random.default_rng((recipe.seed, done)).integers(len(self.texts), size=recipe.batch)
        rows = torch.from_numpy(chosen).to(self.texts.device)
        return contrast.loss(self.pictures[rows].float() / 255, self.texts[rows], self.ids)


def new_contrast(world: World, stage: TowerStage) -> Contrast:
    """With its first weights; between them the first scenes hold every word."""
    texts = {text for i in range(WORDS_FROM) for text in captions_of(world, tower_scene(world, i))}
    words = Vocabulary.of(CaptionTokenizer(stage.text_length, 16).t5(sorted(texts)))
    return Contrast(stage, words)


def train_tower(
    sprites: Sprites, stage: TowerStage, folder: Path, device: torch.device = CPU
) -> SiglipVision:
    """Run the stage to its end from wherever its folder is."""
    world, side = sprites.world, stage.config.image_size
    contrast = new_contrast(world, stage).to(device)

    @contextmanager
    def lessons() -> Iterator[LossFunction]:
        scenes = [tower_scene(world, i) for i in range(stage.drawn)]
        with painted(sprites, scenes, side, folder / "drawn.npy") as pictures:
            captioned = Captioned.of(scenes, pictures, contrast, world)
            yield functools.partial(captioned.loss, contrast, stage.recipe)

    return trained(contrast, stage.recipe, folder, lessons).tower

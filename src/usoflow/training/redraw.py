"""Stage `redraw`: a copy of the base becomes an expert that draws a given picture anew, in a named style.

The USO paper (arXiv 2508.18966, section 3.1) trains experts that stylise and de-stylise, to make triplets.
Here the drawing sets give triplets, and the expert is the LoRA's teacher. All its weights learn, from lessons
with a content picture. That lies where FLUX.1 Kontext has it (arXiv 2506.15742; position method `offset`),
and words tell the style, so that neither USO's modules nor its places are needed. Words alone it is to answer
as the base does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from usoflow.training.base import GUIDANCE, Base, Batches, at_rest, noised, random_numbers
from usoflow.training.captions import CaptionTokenizer, Ids, silenced
from usoflow.training.loop import Recipe
from usoflow.training.text_to_image import STEPS, euler, levels_of
from usoflow.training.triplets import TripletSet

METHOD = "offset"  # where the content picture lies: FLUX.1 Kontext's places


@dataclass(frozen=True, slots=True)
class RedrawStage:
    """What the `redraw` section of a training file says.

    Attributes:
        recipe: length and speed.
        lessons: triplets of each use that are encoded once.
        guidance: with which redrawing is learnt.
        words: share of the batches without a content picture.
        changed: share of the batches whose lessons change the style; in the others it is the content's.
    """

    recipe: Recipe
    lessons: int = 24_000
    guidance: float = 2.0
    words: float = 0.25
    changed: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for shares of more than all, and for no lessons."""
        if min(self.words, self.changed) < 0 or self.words + self.changed > 1 or self.lessons < 1:
            raise ValueError("words and changed are shares of all batches; lessons must be at least 1")


@dataclass(frozen=True)
class Pool:
    """Lessons with a content picture, and what is said of them.

    Attributes:
        lessons: all of a use.
        rows: which of them, int64 [N].
        ids: of what is said of these, for T5 and CLIP.
    """

    lessons: TripletSet
    rows: npt.NDArray[np.int64]
    ids: tuple[Ids, Ids]

    @classmethod
    def kept(cls, lessons: TripletSet, tokenizer: CaptionTokenizer) -> Pool:
        """Lessons whose style is the content's; it is not told."""
        return cls(lessons, np.arange(len(lessons.prompts)), tokenizer(lessons.prompts))

    @classmethod
    def changed(cls, lessons: TripletSet, tokenizer: CaptionTokenizer) -> Pool:
        """Lessons whose style has a name, which is told."""
        return cls(lessons, lessons.named, tokenizer(lessons.told(lessons.named)))

    def pictures(self, which: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Targets and contents, model latents [B, 16, h, w]."""
        return self.lessons.rows("target", self.rows[which]), self.lessons.rows("content", self.rows[which])

    def said(self, which: npt.NDArray[np.int64]) -> tuple[Ids, Ids]:
        """The ids of some lessons."""
        return self.ids[0][which], self.ids[1][which]


@dataclass(frozen=True)
class Redrawing:
    """The expert, the base that it was, captions, and lessons whose style is kept or changed."""

    expert: Base
    plain: Base
    words: Batches
    kept: Pool
    changed: Pool
    stage: RedrawStage
    dtype: torch.dtype

    def loss(self, done: int) -> Tensor:
        """Squared error of a batch of one kind."""
        rng = np.random.default_rng((self.stage.recipe.seed, done))
        kind = rng.random()
        if kind < self.stage.words:
            return self._words_kept(done, rng)
        return self._redrawn(
            self.changed if kind < self.stage.words + self.stage.changed else self.kept, done, rng
        )

    def _words_kept(self, done: int, rng: np.random.Generator) -> Tensor:
        """To the plain base's answer at any guidance that it was taught."""
        x, *ids = self.words.get(done, self.stage.recipe.batch)
        sigma, x_s, _ = self._noised(x, done)
        guidance = float(rng.uniform(1, self.expert.stage.guidance_most))
        with torch.no_grad():
            wanted = self.plain.velocity(
                x_s, sigma, self.plain.encode(*ids), guidance=guidance, dtype=self.dtype
            )
        got = self.expert.velocity(x_s, sigma, self.expert.encode(*ids), guidance=guidance, dtype=self.dtype)
        return (got.float() - wanted.float()).pow(2).mean()

    def _redrawn(self, pool: Pool, done: int, rng: np.random.Generator) -> Tensor:
        """Flow matching with guidance, away from the plain base's unconditional answer."""
        count = self.stage.recipe.batch
        which = rng.integers(len(pool.rows), size=count)
        x, content = pool.pictures(which)
        drop = rng.random(count) < self.expert.stage.dropped
        text = self.expert.encode(*silenced(pool.said(which), self.words.empty, drop))
        sigma, x_s, noise = self._noised(x, done)
        got = redrawn(self.expert, x_s, sigma, text, content, dtype=self.dtype)
        with torch.no_grad():
            silent = self.plain.encode(*(np.repeat(none, count, axis=0) for none in self.words.empty))
            away = self.plain.velocity(x_s, sigma, silent, guidance=1.0, dtype=self.dtype).float()
            wanted = at_rest(noise - x, got, away, self.stage.guidance)
        return (got - wanted).pow(2).mean()

    def _noised(self, x: Tensor, done: int) -> tuple[Tensor, Tensor, Tensor]:
        return noised(x, self.expert.stage, random_numbers(x.device, self.stage.recipe.seed, done))

    @torch.no_grad()
    def sample(self, which: npt.NDArray[np.int64], *, seed: int) -> Tensor:
        """What the expert makes of some lessons that change the style, in 20 steps; model latents."""
        text, (x, content) = self.expert.encode(*self.changed.said(which)), self.changed.pictures(which)
        start = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        answer = functools.partial(redrawn, self.expert, text=text, content=content, dtype=self.dtype)
        return euler(start, levels_of(STEPS), answer)


def redrawn(
    expert: Base,
    x: Tensor,
    sigma: Tensor,
    text: tuple[Tensor, Tensor],
    content: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """An expert's answer to content pictures and what is said of them; float32."""
    return expert.velocity(
        x, sigma, text, guidance=GUIDANCE, dtype=dtype, references=[content], method=METHOD
    ).float()

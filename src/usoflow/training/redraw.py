"""Stage `redraw`: a copy of the base becomes an expert that draws a given picture anew, in a named style.

The USO paper (arXiv 2508.18966, section 3.1) trains experts that stylise and de-stylise, to make triplets.
Here the drawing sets give triplets, and the expert is the LoRA's teacher. All its weights learn, from lessons
with a content picture. That lies where FLUX.1 Kontext has it (arXiv 2506.15742; position method `offset`),
and words tell the style, so that neither USO's modules nor its places are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from usoflow.training.base import GUIDANCE, Base, at_rest, noised
from usoflow.training.captions import CaptionTokenizer, Ids
from usoflow.training.loop import Recipe
from usoflow.training.text_to_image import STEPS, euler, levels_of
from usoflow.training.triplets import TripletSet

METHOD = "offset"  # where the content picture lies: FLUX.1 Kontext's places


@dataclass(frozen=True, slots=True)
class RedrawStage:
    """What the `redraw` section of a training file says.

    Attributes:
        recipe: length and speed.
        lessons: further lessons with both pictures, whose style picture has no random look.
        guidance: with which redrawing is learnt.
        changed: share of the batches whose lessons change the style.
    """

    recipe: Recipe
    lessons: int = 24_000
    guidance: float = 2.0
    changed: float = 0.75


@dataclass(frozen=True)
class Pool:
    """Lessons with a content picture, from several sets, and what is said of them.

    Attributes:
        sets: of the lessons.
        rows: set and row of each lesson, int64 [N, 2].
        ids: of what is said, for T5 and CLIP.
    """

    sets: Sequence[TripletSet]
    rows: npt.NDArray[np.int64]
    ids: tuple[Ids, Ids]

    @classmethod
    def kept(cls, lessons: TripletSet, tokenizer: CaptionTokenizer) -> Pool:
        """Lessons whose style is the content's; it is not told."""
        rows = [(0, row) for row in range(len(lessons.prompts))]
        return cls([lessons], np.asarray(rows, np.int64), tokenizer(lessons.prompts))

    @classmethod
    def changed(cls, sets: Sequence[TripletSet], tokenizer: CaptionTokenizer) -> Pool:
        """Lessons whose style has a name, which is told."""
        rows = [(number, int(row)) for number, found in enumerate(sets) for row in found.named]
        texts = [text for found in sets for text in found.told(found.named)]
        return cls(sets, np.asarray(rows, np.int64), tokenizer(texts))

    def pictures(self, which: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Targets and contents, model latents [B, 16, h, w]."""
        target, content = (
            torch.cat([self.sets[number].rows(name, np.asarray([row])) for number, row in self.rows[which]])
            for name in ("target", "content")
        )
        return target, content

    def said(self, which: npt.NDArray[np.int64]) -> tuple[Ids, Ids]:
        """The ids of some lessons."""
        return self.ids[0][which], self.ids[1][which]


@dataclass(frozen=True)
class Redrawing:
    """The expert, the base that it was, which stays, and the lessons whose style is kept or changed."""

    expert: Base
    plain: Base
    kept: Pool
    changed: Pool
    stage: RedrawStage
    dtype: torch.dtype

    def loss(self, done: int) -> Tensor:
        """Flow matching with guidance, away from the plain base's unconditional answer."""
        count, seed = self.stage.recipe.batch, self.stage.recipe.seed
        rng = np.random.default_rng((seed, done))
        pool = self.changed if rng.random() < self.stage.changed else self.kept
        which = rng.integers(len(pool.rows), size=count)
        x, content = pool.pictures(which)
        drop = rng.random(count)[:, None] < self.expert.stage.dropped
        t5, clip = (
            np.where(drop, none, ids) for none, ids in zip(self._empty, pool.said(which), strict=True)
        )
        sigma, x_s, noise = noised(x, self.expert.stage, torch.Generator().manual_seed((seed << 32) + done))
        got = redrawn(self.expert, x_s, sigma, self.expert.encode(t5, clip), content, dtype=self.dtype)
        with torch.no_grad():
            silent = self.plain.encode(*(np.repeat(none, count, axis=0) for none in self._empty))
            away = self.plain.velocity(x_s, sigma, silent, guidance=1.0, dtype=self.dtype).float()
            wanted = at_rest(noise - x, got, away, self.stage.guidance)
        return (got - wanted).pow(2).mean()

    @torch.no_grad()
    def sample(self, which: npt.NDArray[np.int64], *, seed: int) -> Tensor:
        """What the expert makes of some lessons that change the style, in 20 steps; model latents."""
        text, (x, content) = self.expert.encode(*self.changed.said(which)), self.changed.pictures(which)
        start = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        answer = functools.partial(redrawn, self.expert, text=text, content=content, dtype=self.dtype)
        return euler(start, levels_of(STEPS), answer)

    @functools.cached_property
    def _empty(self) -> tuple[Ids, Ids]:
        return self.expert.stage.tokenizer([""])


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

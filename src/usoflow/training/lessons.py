"""What the stages of Pocket USO learn from: encoded triplets and the ids of their prompts, in batches.

Read from the caches of `triplets`; `uso` asks for a batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from usoflow.training.captions import CaptionTokenizer, Ids, silenced
from usoflow.training.triplets import STYLED, Encoders, TripletSet, Use, cache_triplets, lesson_cast

Mix = tuple[tuple[Use, float], ...]  # shares of the uses; they add up to 1

LESSON_SEED = 51
DROPPED = 0.1  # of the prompts


def lesson_sets(
    encoders: Encoders, folder: Path, uses: Iterable[Use], *, count: int, name: str = "lessons"
) -> dict[Use, TripletSet]:
    """The lessons of some uses, encoded once, in `folder/NAME-USE`."""
    world = encoders.sprites.world
    return {
        use: cache_triplets(
            encoders, folder / f"{name}-{use}", cast=lesson_cast(world, use), use=use,
            seed=LESSON_SEED, count=count,
        )
        for use in dict.fromkeys(uses)
    }  # fmt: skip


@dataclass(frozen=True)
class Lessons:
    """Encoded triplets of every use, with the ids of their prompts.

    `named` are those with pictures of which words tell all: the style, where it is another, has a name;
    `told` are the ids of those words.
    """

    sets: Mapping[Use, TripletSet]
    ids: Mapping[Use, tuple[Ids, Ids]]
    empty: tuple[Ids, Ids]
    named: Mapping[Use, npt.NDArray[np.int64]]
    told: Mapping[Use, tuple[Ids, Ids]]

    @classmethod
    def of(cls, sets: Mapping[Use, TripletSet], tokenizer: CaptionTokenizer) -> Lessons:
        """Tokenise all prompts."""
        ids = {use: tokenizer(found.prompts) for use, found in sets.items()}
        named = {use: found.named for use, found in sets.items() if use in STYLED}
        told = {use: tokenizer(sets[use].told(numbers)) for use, numbers in named.items()}
        if "subject" in sets:
            named["subject"], told["subject"] = np.arange(len(sets["subject"].prompts)), ids["subject"]
        return cls(sets, ids, tokenizer([""]), named, told)

    def silence(self, count: int) -> tuple[Ids, Ids]:
        """The ids of empty prompts."""
        t5, clip = (np.repeat(none, count, axis=0) for none in self.empty)
        return t5, clip

    def first(self, use: Use, count: int) -> Batch:
        """The first lessons of a use, prompts as they are."""
        t5, clip = self.ids[use]
        return Batch(use, np.arange(count), (t5[:count], clip[:count]))

    def choose(self, mix: Mix, rng: np.random.Generator, count: int, *, told: float = 0.0) -> Batch:
        """A batch of one use; a tenth of the prompts is dropped.

        `told` is the chance that lessons with pictures are such of which words tell all; none is dropped
        there.
        """
        uses, weights = zip(*mix, strict=True)
        use = uses[int(rng.choice(len(uses), p=weights))]
        if len(self.named.get(use, ())) and rng.random() < told:
            return self.with_name(use, rng.integers(len(self.named[use]), size=count))
        indices = rng.integers(len(self.sets[use].prompts), size=count)
        drop = rng.random(count) < DROPPED
        t5, clip = self.ids[use]
        return Batch(use, indices, silenced((t5[indices], clip[indices]), self.empty, drop))

    def with_name(self, use: Use, which: npt.NDArray[np.int64]) -> Batch:
        """Lessons of a use of which words tell all, by their numbers among `named`."""
        indices = self.named[use][which]
        t5, clip = self.ids[use]
        told_t5, told_clip = self.told[use]
        return Batch(use, indices, (t5[indices], clip[indices]), (told_t5[which], told_clip[which]))


@dataclass(frozen=True)
class Batch:
    """Lessons of one use.

    Attributes:
        use: what the model is given.
        indices: which lessons.
        ids: of their prompts, for T5 and CLIP.
        told: of their prompts with the style's name, where words tell all.
    """

    use: Use
    indices: npt.NDArray[np.int64]
    ids: tuple[Ids, Ids]
    told: tuple[Ids, Ids] | None = None

"""Captions as token ids, in a vocabulary of the rows that occur.

The official vocabularies have 81 000 rows of which the captions of the world use a few hundred. Training
holds only those (`Vocabulary.compact`); packaging writes the full tables (`Vocabulary.expand`), in which
every other row is what training made of unknown words, row 0. Used by `latents`, `base` and `package`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from usoflow.models.tokens import CLIP_END, ClipTokenizer, T5Tokenizer

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a table that occur, and where they are in the small table."""

    rows: tuple[int, ...]

    @classmethod
    def of(cls, ids: Ids) -> Vocabulary:
        """All ids that occur."""
        return cls(tuple(int(row) for row in np.unique(ids)))

    def compact(self, ids: Ids) -> Tensor:
        """Official ids -> int64 rows of the small table; an id that does not occur becomes row 0."""
        found = np.searchsorted(self.rows, ids).clip(max=len(self.rows) - 1)
        known = np.asarray(self.rows)[found] == ids
        return torch.from_numpy(np.where(known, found, 0))

    def expand(self, table: Tensor, total: int) -> Tensor:
        """The small table [rows, dim] -> the official one [total, dim]."""
        full = table[:1].repeat(total, 1)
        full[list(self.rows)] = table
        return full


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """Captions to rectangular ids for both encoders, as the prompt of a workflow would be tokenised."""

    t5_length: int
    clip_length: int

    def t5(self, texts: Sequence[str]) -> Ids:
        """[N, t5_length]; a caption that is longer is cut, which no caption of the world is."""
        tokenizer = T5Tokenizer(self.t5_length)
        return _stack(tokenizer(text).ids[: self.t5_length] for text in texts)

    def clip(self, texts: Sequence[str]) -> Ids:
        """[N, clip_length]: the first chunk of each."""
        tokenizer = ClipTokenizer(self.clip_length)
        return _stack(tokenizer(text)[0].ids for text in texts)

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """The ids for T5 and for CLIP."""
        return self.t5(texts), self.clip(texts)


def silenced(ids: tuple[Ids, Ids], empty: tuple[Ids, Ids], where: npt.NDArray[np.bool_]) -> tuple[Ids, Ids]:
    """The ids of captions for T5 and CLIP, [N, T] each; those of an empty one `where` [N] says so."""
    t5, clip = (np.where(where[:, None], none, said) for none, said in zip(empty, ids, strict=True))
    return t5, clip


def end_positions(clip_ids: Ids) -> Tensor:
    """Where the first end token of each row is; [N] int64."""
    return torch.from_numpy((clip_ids == CLIP_END).argmax(axis=1))


def _stack(rows: Iterable[Sequence[int]]) -> Ids:
    return np.asarray(list(rows), dtype=np.int64)

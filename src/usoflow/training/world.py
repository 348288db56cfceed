"""The closed world that the pocket models know: subjects, drawing sets, renderings, and what is held out.

Read from `world.json` beside this file; used by `drawings`, `scenes` and `evaluate`. Which subjects and
styles are held out follows from a hash of their names, so that the split can be checked and never drifts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

GALLERY = 100  # held-out subjects in all, things included


@dataclass(frozen=True)
class World:
    """Everything that a picture can be made of.

    Attributes:
        subjects: names in the drawing sets ("hot-dog"), sorted.
        core: the seen subjects that the shipped base was trained on.
        things, signs: what only the lessons of Pocket USO show beside the subjects; signs look much alike.
        sets: drawing sets and the words that name them in captions.
        renderings: whole-picture styles and the words that name them.
        held_out: names of subjects, sets and renderings that no training picture shows.
    """

    subjects: tuple[str, ...]
    core: tuple[str, ...]
    things: tuple[str, ...]
    signs: tuple[str, ...]
    sets: Mapping[str, str]
    renderings: Mapping[str, str]
    held_out: frozenset[str]

    @classmethod
    def load(cls) -> World:
        """The world of the package.

        The published split is in the file; a test compares it with the hash.
        """
        data = json.loads(resources.files("usoflow.training").joinpath("world.json").read_text("utf-8"))
        return cls(
            subjects=tuple(data["subjects"]),
            core=tuple(data["core"]),
            things=tuple(data["things"]),
            signs=tuple(data["signs"]),
            sets=data["sets"],
            renderings=data["renderings"],
            held_out=frozenset(data["held_out"]),
        )

    @property
    def drawn(self) -> tuple[str, ...]:
        """Everything that is rendered."""
        return (*self.subjects, *self.things, *self.signs)

    @functools.cached_property
    def drawn_index(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.drawn)}

    @functools.cached_property
    def set_index(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.sets)}

    @functools.cached_property
    def seen_subjects(self) -> tuple[str, ...]:
        return tuple(name for name in self.subjects if name not in self.held_out)

    @functools.cached_property
    def held_out_subjects(self) -> tuple[str, ...]:
        return tuple(name for name in self.subjects if name in self.held_out)

    @functools.cached_property
    def lesson_subjects(self) -> tuple[str, ...]:
        """What the lessons of Pocket USO show."""
        return tuple(name for name in self.drawn if name not in self.held_out)

    @functools.cached_property
    def gallery(self) -> tuple[str, ...]:
        """The held-out subjects and things, among which Pocket USO is measured."""
        return tuple(name for name in self.drawn if name in self.held_out)

    @functools.cached_property
    def seen_sets(self) -> tuple[str, ...]:
        return tuple(name for name in self.sets if name not in self.held_out)

    @functools.cached_property
    def seen_renderings(self) -> tuple[str, ...]:
        return tuple(name for name in self.renderings if name not in self.held_out)


def words(subject: str) -> str:
    """A subject's name in a caption: "hot-dog" -> "hot dog"."""
    return subject.replace("-", " ")

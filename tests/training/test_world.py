"""The split is the published one, and nothing held out is ever trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.renderings import RENDERINGS
from usoflow.training.scenes import caption, draw_scene, held_out_scene, noun
from usoflow.training.world import GALLERY, World

WORLD = World.load()
HELD_OUT_SUBJECTS = 0.1  # of all subjects
HELD_OUT_SETS = 1
HELD_OUT_RENDERINGS = 3


def rank(name: str) -> str:
    """The order in which names are held out: lowest first."""
    return hashlib.sha256(f"usoflow world {name}".encode()).hexdigest()


def lowest(names: Iterable[str], count: int) -> frozenset[str]:
    """The `count` names that are held out."""
    return frozenset(sorted(names, key=rank)[:count])


def test_split_follows_from_the_hash() -> None:
    subjects = lowest(WORLD.subjects, round(HELD_OUT_SUBJECTS * len(WORLD.subjects)))
    styles = lowest(WORLD.sets, HELD_OUT_SETS) | lowest(WORLD.renderings, HELD_OUT_RENDERINGS)
    things = lowest(WORLD.things, GALLERY - len(subjects))
    assert subjects | styles | things == WORLD.held_out


def test_seen_and_held_out_are_disjoint_and_complete() -> None:
    seen, held_out = set(WORLD.seen_subjects), set(WORLD.held_out_subjects)
    assert not seen & held_out
    assert seen | held_out == set(WORLD.subjects)
    assert set(WORLD.core) < seen
    assert len(WORLD.held_out & ({*WORLD.sets} | {*WORLD.renderings})) >= 3


def test_lessons_show_what_is_not_in_the_gallery() -> None:
    assert len(WORLD.gallery) == GALLERY
    assert set(WORLD.gallery) <= WORLD.held_out
    assert not set(WORLD.lesson_subjects) & WORLD.held_out
    assert {*WORLD.lesson_subjects, *WORLD.gallery} == set(WORLD.drawn)
    assert len(set(WORLD.drawn)) == len(WORLD.drawn)


def test_training_scenes_show_nothing_held_out() -> None:
    for index in range(2000):
        scene = draw_scene(WORLD, 3, index)
        used = {p.subject for p in scene.placed} | {scene.drawing_set, scene.rendering}
        assert not used & WORLD.held_out


def test_held_out_scenes_show_held_out_subjects() -> None:
    scenes = [held_out_scene(WORLD, 3, index) for index in range(300)]
    assert {p.subject for scene in scenes for p in scene.placed} == set(WORLD.held_out_subjects)
    assert {scene.drawing_set for scene in scenes} == set(WORLD.sets)


def test_scene_follows_from_seed_and_index() -> None:
    assert draw_scene(WORLD, 3, 7) == draw_scene(WORLD, 3, 7)
    assert draw_scene(WORLD, 3, 7) != draw_scene(WORLD, 4, 7)
    assert draw_scene(WORLD, 3, 7) != draw_scene(WORLD, 3, 8)


def test_caption_names_subject_and_background() -> None:
    for index in range(200):
        scene = draw_scene(WORLD, 3, index)
        text = caption(WORLD, scene)
        assert BACKGROUNDS[scene.background].phrase in text
        assert all(p.subject.replace("-", " ") in text for p in scene.placed)


def test_nouns() -> None:
    assert noun("ant") == "an ant"
    assert noun("bus", "small ") == "a small bus"
    assert noun("cherries") == "cherries"
    assert noun("octopus") == "an octopus"
    assert noun("unicorn") == "a unicorn"


def test_backgrounds_and_renderings_keep_size_range_and_seed() -> None:
    for name, background in BACKGROUNDS.items():
        first, again = (background.paint(32, np.random.default_rng(5)) for _ in range(2))
        assert first.shape == (32, 32, 3), name
        assert 0 <= first.min() <= first.max() <= 1, name
        assert np.array_equal(first, again), name
    picture = BACKGROUNDS["beach"].paint(48, np.random.default_rng(1))
    assert set(RENDERINGS) == set(WORLD.renderings)
    for name, rendering in RENDERINGS.items():
        first, again = (rendering(picture.copy(), np.random.default_rng(5)) for _ in range(2))
        assert first.shape == picture.shape, name
        assert first.dtype == np.float32, name
        assert -1e-5 <= first.min() <= first.max() <= 1 + 1e-5, name
        assert np.array_equal(first, again), name
        assert np.abs(first - picture).mean() > 0.01, name

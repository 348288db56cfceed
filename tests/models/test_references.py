"""Position ids of references: against the reference's own, and by the words of their definitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usoflow.errors import UsoflowError
from usoflow.models.references import position_ids

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def test_golden_uxo_ids(golden) -> None:
    found = position_ids((16, 16), [(8, 12), (14, 6)], "uxo")
    assert torch.equal(found, torch.from_numpy(golden("dit").z["ids.uxo.img"][0]).float())


def test_image_alone_counts_rows_and_columns() -> None:
    assert position_ids((4, 6)).tolist() == [[0, r, c] for r in range(2) for c in range(3)]


@pytest.mark.parametrize("name", ["uxo", "uso", "uxo/uno"])
def test_names_of_uxo(name: str) -> None:
    assert torch.equal(position_ids((4, 4), [(2, 2)], name), position_ids((4, 4), [(2, 2)], "uxo"))


EVEN = st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda size: (2 * size[0], 2 * size[1]))


@given(image=SIZES, references=st.lists(EVEN, max_size=4))
def test_uxo_runs_down_the_diagonal(image: tuple[int, int], references: list[tuple[int, int]]) -> None:
    """No reference shares a row or a column with the image or with another reference.

    References of odd sides can share one: the reference adds up latent rows and halves the sum.
    """
    ids = position_ids(image, references, "uxo")
    counts = [-(-h // 2) * -(-w // 2) for h, w in (image, *references)]
    parts = ids.split(counts)
    for axis in (1, 2):
        ranges = [(part[:, axis].min(), part[:, axis].max()) for part in parts]
        assert all(before[1] < after[0] for before, after in pairwise(ranges))


@given(image=SIZES, references=st.lists(SIZES, max_size=4))
def test_index_numbers_the_references(image: tuple[int, int], references: list[tuple[int, int]]) -> None:
    ids = position_ids(image, references, "index")
    assert ids[:, 0].unique().tolist() == list(range(len(references) + 1))


@given(references=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4))
def test_offset_tiles_do_not_overlap(references: list[tuple[int, int]]) -> None:
    even = [(2 * h, 2 * w) for h, w in references]
    ids = position_ids((8, 8), even, "offset")[16:]
    assert (ids[:, 0] == 1).all()
    assert len(ids.unique(dim=0)) == len(ids)


def test_there_is_no_such_method() -> None:
    with pytest.raises(UsoflowError, match="diagonal") as caught:
        position_ids((4, 4), [(2, 2)], "diagonal")
    assert caught.value.code == "reference_method"


def test_of_equal_sides_the_next_tile_is_below() -> None:
    assert position_ids((4, 4), [(4, 4), (4, 4)], "offset")[8].tolist() == [1, 2, 0]


def test_the_method_of_later_models_is_offset() -> None:
    sizes = [(4, 6), (6, 2)]
    found = position_ids((4, 4), sizes, "index_timestep_zero")
    assert torch.equal(found, position_ids((4, 4), sizes, "offset"))

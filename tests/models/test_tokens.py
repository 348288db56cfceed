"""Prompt weights against a grammar that knows the answer; ids against transformers and the goldens."""

from __future__ import annotations

import base64
import json
import logging
import lzma
import subprocess
import sys
from importlib import resources
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase
from transformers import T5Tokenizer as TransformersT5Tokenizer

from usoflow.models.tokens import (
    CLIP_END,
    CLIP_START,
    T5_END,
    T5_PAD,
    ClipTokenizer,
    Segment,
    T5Tokenizer,
    TokenSequence,
    parse_weights,
)

GOLDEN = Path(__file__).parents[1] / "golden"

# What people type: everything but control characters and exotic spaces, which transformers splits otherwise.
ORDINARY = st.text(
    st.one_of(st.characters(exclude_categories=["Cs", "Cc", "Z"]), st.sampled_from(" \n\t'"))
).filter(lambda text: "(" not in text and ")" not in text and "embedding:" not in text)


# --- weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("(a)", [("a", 1.1)]),
        ("()", []),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("(a (b) c)", [("a ", 1.1), ("b", 1.2100000000000002), (" c", 1.1)]),
        ("(a:1.3) x", [("a", 1.3), (" x", 1.0)]),
        ("((a:1.3) b:2)", [("a", 1.3), (" b", 2.0)]),
        ("((a) b:2)", [("a", 2 * 1.1), (" b", 2.0)]),
        ("(a:-1.5)", [("a", -1.5)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a:1.5:2)", [("a:1.5", 2.0)]),
        ("(a:abc)", [("a:abc", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:nan)", [("a:nan", 1.1)]),
        ("(a:inf)", [("a:inf", 1.1)]),
        ("[a]", [("[a]", 1.0)]),
        (r"\(a\)", [("(a)", 1.0)]),
        (r"(\(a\):1.2)", [("(a)", 1.2)]),
        (r"(a\)", [(r"(a)", 1.0)]),
        ("a(b", [("a", 1.0), ("(b", 1.0)]),
        ("a (b (c) d", [("a ", 1.0), ("(b (c) d", 1.0)]),
        ("a) (b)", [("a) ", 1.0), ("b", 1.1)]),
    ],
)
def test_weights_by_example(text: str, expected: list[tuple[str, float]]) -> None:
    assert parse_weights(text) == tuple(Segment(*pair) for pair in expected)


WORDS = st.text("ab ,.[]é", min_size=1)
TREES = st.recursive(
    WORDS,
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=4), st.none() | st.floats(-9, 9)),
    max_leaves=12,
)
Tree = str | tuple[list["Tree"], float | None]


def written(tree: Tree) -> str:
    if isinstance(tree, str):
        return tree
    children, weight = tree
    text = "".join(map(written, children))
    return f"({text})" if weight is None else f"({text}:{weight!r})"


def weighed(tree: Tree, outer: float) -> list[tuple[str, float]]:
    """Every character with its weight."""
    if isinstance(tree, str):
        return [(character, outer) for character in tree]
    children, number = tree
    weight = outer * 1.1 if number is None else number
    return [pair for child in children for pair in weighed(child, weight)]


@given(st.lists(TREES))
def test_every_character_has_the_weight_that_the_grammar_says(trees: list[Tree]) -> None:
    segments = parse_weights("".join(map(written, trees)))
    found = [(character, segment.weight) for segment in segments for character in segment.text]
    assert found == [pair for tree in trees for pair in weighed(tree, 1.0)]


@given(st.text(st.sampled_from("()\\:1.a e-")))
def test_weights_never_raise_and_lose_nothing_but_syntax(text: str) -> None:
    segments = parse_weights(text)
    assert all(segment.text for segment in segments)
    remaining = iter(text)
    assert all(character in remaining for segment in segments for character in segment.text), "in order"
    kept = sum(character in "a e-" for segment in segments for character in segment.text)
    assert kept == sum(character in "a e-" for character in text) or ":" in text  # a weight may hold e and -


@given(st.text().filter(lambda text: "(" not in text and ")" not in text))
def test_text_without_parentheses_is_one_segment_as_it_is(text: str) -> None:
    assert parse_weights(text) == ((Segment(text, 1.0),) if text else ())


def test_deep_nesting_is_not_limited_by_recursion() -> None:
    (segment,) = parse_weights("(" * 5000 + "a" + ")" * 5000)
    assert segment.weight == pytest.approx(1.1**5000)


# --- ids ----------------------------------------------------------------------------------------------


def read(name: str) -> str:
    data = resources.files("usoflow.models").joinpath("tokenizers", name).read_bytes()
    return lzma.decompress(data).decode()


@pytest.fixture(scope="module")
def clip_oracle() -> PreTrainedTokenizerBase:
    merges = [tuple(line.split(" ")) for line in read("clip_merges.txt.xz").splitlines()]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)


@pytest.fixture(scope="module")
def t5_oracle() -> PreTrainedTokenizerBase:
    published = json.loads(read("t5.json.xz"))
    characters = published["normalizer"]["normalizers"][0]["precompiled_charsmap"]
    return TransformersT5Tokenizer(
        vocab=[tuple(pair) for pair in published["model"]["vocab"]],
        _spm_precompiled_charsmap=base64.b64decode(characters),
    )


@settings(deadline=None)  # the first call reads the vocabulary
@given(ORDINARY)
def test_clip_ids_equal_transformers(clip_oracle: PreTrainedTokenizerBase, text: str) -> None:
    expected = clip_oracle(text).input_ids
    (chunk,) = ClipTokenizer(length=len(expected))(text)
    assert list(chunk.ids) == expected


@settings(deadline=None)  # the first call reads the vocabulary
@given(ORDINARY)
def test_t5_ids_equal_transformers(t5_oracle: PreTrainedTokenizerBase, text: str) -> None:
    assert list(T5Tokenizer(min_length=0)(text).ids) == t5_oracle(text).input_ids


@pytest.mark.parametrize(
    ("text", "clip", "t5"),
    [  # published ids of both vocabularies
        ("", [], []),
        ("don't stop", [847, 713, 1691], [278, 31, 17, 1190]),
        ("a\n\nb", [320, 321], [3, 9, 3, 115]),
        ("<|endoftext|> bye", [49407, 4460], [3, 2, 9175, 989, 858, 6327, 9175, 3155, 57, 15]),
        ("İstanbul ß ẞ", [328, 16384, 11231, 127, 509, 127, 509], [3, 2, 5627, 6724, 3, 5202, 3, 2]),
        ("a </s> b <extra_id_0>", None, [3, 9, 1, 3, 115, 32099]),
    ],
)
def test_published_ids(text: str, clip: list[int] | None, t5: list[int]) -> None:
    if clip is not None:
        padding = [CLIP_END] * (76 - len(clip))
        assert list(ClipTokenizer()(text)[0].ids) == [CLIP_START, *clip, *padding]
    assert list(T5Tokenizer()(text).ids) == [*t5, T5_END, *[T5_PAD] * (255 - len(t5))]


def test_each_segment_is_tokenised_on_its_own() -> None:
    sequence = T5Tokenizer(min_length=0)("a(b")  # as one text, "(b" would not begin a word
    assert list(sequence.ids) == [3, 9, 41, 115, T5_END]


def test_weights_follow_their_tokens() -> None:
    (chunk,) = ClipTokenizer(length=8)("a (blue eyes:1.3)")
    assert chunk.ids[:5] == (CLIP_START, 320, 1746, 3095, CLIP_END)
    assert chunk.weights == (1.0, 1.0, 1.3, 1.3, 1.0, 1.0, 1.0, 1.0)
    assert chunk.weighted
    assert not ClipTokenizer()("a (blue eyes:1)")[0].weighted


@pytest.mark.parametrize(("words", "first_chunk"), [(5, 75), (7, 70), (8, 75)])
def test_only_segments_of_eight_tokens_are_cut(words: int, first_chunk: int) -> None:
    chunk = ClipTokenizer()("word " * 70 + f"({'word ' * words})")[0]
    assert chunk.ids.index(CLIP_END) - 1 == first_chunk


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=12))
def test_clip_chunks_keep_short_segments_whole(counts: list[int]) -> None:
    prompt = "".join(f"({' '.join(['word'] * n)}:{i + 2})" for i, n in enumerate(counts))
    chunks = ClipTokenizer()(prompt)
    assert all(chunk.ids[0] == CLIP_START and len(chunk.ids) == len(chunk.weights) == 77 for chunk in chunks)
    assert all(chunk.ids[-1] == CLIP_END for chunk in chunks)
    held = [[w for w in chunk.weights if w != 1.0] for chunk in chunks]
    assert list(chain(*held)) == [i + 2.0 for i, n in enumerate(counts) for _ in range(n)]
    for i, n in enumerate(counts):
        pieces = [weights.count(i + 2.0) for weights in held if i + 2.0 in weights]
        assert n >= 8 or pieces == [n], "cut although short"
    for weights, following in pairwise(held):
        moved = following.count(following[0])
        assert len(weights) == 75 or (len(weights) + moved > 75 and moved < 8), "room left without need"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("a embedding:foo b", "a  b"),
        ("embedding:foo,", ","),
        ("embedding:", ""),
        ("a embedding: b", "a  b"),
        ("(embedding:foo:1.2) b", "() b"),
    ],
)
def test_embeddings_are_dropped_with_a_warning(
    text: str, without: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        sequence = T5Tokenizer()(text)
    assert sequence == T5Tokenizer()(without)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_many_commas_after_an_embedding_take_no_time() -> None:
    """A pattern that tried every comma as the name's end would take minutes, and hold all threads."""
    code = "from usoflow.models.tokens import T5Tokenizer as T; T()('embedding:' + ',' * 100_000 + 'x')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_word_that_only_ends_like_an_embedding_stays() -> None:
    assert T5Tokenizer()("myembedding:foo") != T5Tokenizer()("")


def test_half_a_surrogate_pair_is_no_crash() -> None:
    assert T5Tokenizer()("a \ud83d b") == T5Tokenizer()("a ? b")


@pytest.mark.parametrize(("words", "total"), [(10, 256), (255, 256), (256, 257), (400, 401)])
def test_t5_is_padded_and_never_cut(words: int, total: int) -> None:
    sequence = T5Tokenizer()("word " * words)
    assert len(sequence.ids) == len(sequence.weights) == total
    assert sequence.ids[words] == T5_END


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from usoflow.models.tokens import T5Tokenizer;"
        "T5Tokenizer()('a'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def stripped(sequence: TokenSequence, pad: int) -> dict[str, object]:
    """A sequence as the goldens write it: without trailing padding, weights other than 1 by position."""
    end = len(sequence.ids)
    while end and (sequence.ids[end - 1], sequence.weights[end - 1]) == (pad, 1.0):
        end -= 1
    weights = {str(i): weight for i, weight in enumerate(sequence.weights) if weight != 1.0}
    return {
        "ids_without_trailing_pad": list(sequence.ids[:end]),
        "weights": weights,
        "total": len(sequence.ids),
    }


def test_goldens() -> None:
    cases = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) > 30
    for case in cases:
        assert [stripped(s, CLIP_END) for s in ClipTokenizer()(case["prompt"])] == case["l"], case["prompt"]
        assert [stripped(T5Tokenizer()(case["prompt"]), T5_PAD)] == case["t5xxl"], case["prompt"]

"""Prompt text to token ids and weights, for CLIP-L and T5. Imports no torch.

A prompt is cut into weighted segments by ComfyUI's parenthesis syntax (`parse_weights`), each segment is
tokenised on its own, and the ids are laid out as each encoder wants them: chunks of 77 for CLIP, one padded
sequence for T5. `text.encode_prompt` takes it from there.

The vocabularies lie in `tokenizers/` (origins and licences: NOTICE) and are read on first use, in well
under 0.1 s: `clip_merges.txt.xz`, the merges of OpenAI's CLIP, from which its whole vocabulary follows;
`t5.json.xz`, the SentencePiece model of T5 in the `tokenizers` library's own format.
"""

from __future__ import annotations

import functools
import logging
import lzma
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

logger = logging.getLogger(__name__)

PARENTHESIS_WEIGHT = 1.1  # what one pair of parentheses without a number multiplies by
WHOLE_GROUP = 8  # segments of fewer tokens are not cut at the edge of a CLIP chunk

CLIP_LENGTH = 77
CLIP_START = 49406
CLIP_END = 49407  # also the padding
CLIP_VOCABULARY = 49408

T5_PAD = 0
T5_END = 1
T5_MIN_LENGTH = 256
T5_VOCABULARY = 32100  # tokens; the official embedding table has 28 rows more, which no token uses

_ESCAPED = re.compile(r"\\([()])")
_MARKS = re.compile(r"\\[()]|[()]")
_EMBEDDING = re.compile(r"(?<!\S)embedding:\S*")

# The split pattern of OpenAI's CLIP (simple_tokenizer.py), after lower-casing.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of prompt text, escapes resolved, and its weight."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """What an encoder reads in one run: ids with padding, and one weight per id (1.0 for what was added)."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return any(weight != 1.0 for weight in self.weights)


# --- weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """A pair of parentheses being read: where its text ends, and the weight that holds around it."""

    text_end: int
    outer_weight: float


def parse_weights(text: str) -> tuple[Segment, ...]:
    r"""Cut a prompt into segments of one weight each.

    `(x)` multiplies the weight by 1.1, `(x:1.3)` sets it to 1.3 whatever is around it; the last colon
    counts, and without a finite number after it the colon is text. `\(` and `\)` are literal parentheses.
    Everything from a parenthesis on that is never closed is plain text of weight 1; one that closes nothing
    is plain text too. Brackets mean nothing. Never raises.

    Returns:
        The segments in order, none of them empty; text without parentheses is one segment of weight 1.
    """
    closes, rest = _pairs(text)
    ends = set(closes.values())
    segments: list[Segment] = []
    groups: list[_Group] = []
    begin, weight = 0, 1.0
    for mark in _MARKS.finditer(text, 0, rest):
        at = mark.start()
        if at in closes:
            segments.append(Segment(text[begin:at], weight))
            groups.append(_Group(_text_end(text, at + 1, closes[at]), weight))
            weight = _inner_weight(text[groups[-1].text_end : closes[at]], weight)
        elif at in ends:
            segments.append(Segment(text[begin : groups[-1].text_end], weight))
            weight = groups.pop().outer_weight
        else:
            continue
        begin = mark.end()
    segments += [Segment(text[begin:rest], weight), Segment(text[rest:], 1.0)]
    return tuple(Segment(_ESCAPED.sub(r"\1", s.text), s.weight) for s in segments if s.text)


def _pairs(text: str) -> tuple[Mapping[int, int], int]:
    """Where each opened parenthesis is closed, and where the first is that never is (or the text's end)."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for mark in _MARKS.finditer(text):
        if mark.group() == "(":
            opened.append(mark.start())
        elif mark.group() == ")" and opened:
            pairs[opened.pop()] = mark.start()
    return pairs, opened[0] if opened else len(text)


def _text_end(text: str, begin: int, close: int) -> int:
    """Where the text of a group ends: at the colon before its number, else at its closing parenthesis."""
    colon = text.rfind(":", begin, close)
    return colon if colon > begin and _number(text[colon + 1 : close]) is not None else close


def _inner_weight(suffix: str, outer: float) -> float:
    """Weight inside a group whose text is followed by `suffix`: ":1.3" or nothing."""
    number = _number(suffix[1:])
    return outer * PARENTHESIS_WEIGHT if number is None else number


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- tokenizers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClipTokenizer:
    """CLIP-L's byte-pair encoding, in chunks of `length` ids. Reads the vocabulary with the first text."""

    length: int = CLIP_LENGTH

    def __call__(self, text: str) -> tuple[TokenSequence, ...]:
        """The chunks of a prompt, at least one; each is `length` ids: start, tokens, end, padding.

        A segment that does not fit in what is left of a chunk goes to the next one whole if it has fewer
        than 8 tokens, and is cut at the edge if it has more.
        """
        chunks = _fill(_tokenise(_clip_vocabulary(), text), self.length - 2)
        return tuple(self._framed(chunk) for chunk in chunks)

    def _framed(self, chunk: Sequence[tuple[int, float]]) -> TokenSequence:
        added = self.length - 1 - len(chunk)
        return TokenSequence(
            (CLIP_START, *(token for token, _ in chunk), *[CLIP_END] * added),
            (1.0, *(weight for _, weight in chunk), *[1.0] * added),
        )


@dataclass(frozen=True, slots=True)
class T5Tokenizer:
    """T5's SentencePiece unigrams, padded to `min_length` ids. Reads the vocabulary with the first text."""

    min_length: int = T5_MIN_LENGTH

    def __call__(self, text: str) -> TokenSequence:
        """One sequence, never cut: tokens, end, padding up to `min_length`."""
        tokens = [token for group in _tokenise(_t5_vocabulary(), text) for token in group]
        padding = max(0, self.min_length - len(tokens) - 1)
        return TokenSequence(
            (*(token for token, _ in tokens), T5_END, *[T5_PAD] * padding),
            (*(weight for _, weight in tokens), *[1.0] * (padding + 1)),
        )


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The two tokenizers that FLUX.1 reads a prompt with."""

    clip: ClipTokenizer
    t5: T5Tokenizer


def _tokenise(tokenizer: Tokenizer, text: str) -> list[list[tuple[int, float]]]:
    """(id, weight) of the tokens of each segment; names of special tokens in the text become those tokens."""
    valid = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of surrogate pairs
    return [
        [(token, segment.weight) for token in tokenizer.encode(words, add_special_tokens=False).ids]
        for segment in parse_weights(valid)
        if (words := _without_embeddings(segment.text))
    ]


def _without_embeddings(text: str) -> str:
    """Text without its `embedding:NAME` words; commas behind a name stay.

    ComfyUI reads such a word as the name of a textual-inversion file. None exist for FLUX.1, so, as there
    when the file is missing, the word is dropped with a warning.
    """

    def commas_after(word: re.Match[str]) -> str:
        name = word.group().rstrip(",")
        logger.warning("%r names no embedding that usoflow can load; the word is ignored.", name)
        return word.group()[len(name) :]

    return _EMBEDDING.sub(commas_after, text)


def _fill(groups: Iterable[list[tuple[int, float]]], room: int) -> list[list[tuple[int, float]]]:
    """Lay groups of tokens into chunks of at most `room` tokens."""
    chunks: list[list[tuple[int, float]]] = [[]]
    for group in groups:
        rest = group
        while len(rest) > room - len(chunks[-1]):
            cut = 0 if len(rest) < WHOLE_GROUP and chunks[-1] else room - len(chunks[-1])
            chunks[-1].extend(rest[:cut])
            rest = rest[cut:]
            chunks.append([])
        chunks[-1].extend(rest)
    return chunks


@functools.cache
def _clip_vocabulary() -> Tokenizer:
    """CLIP's vocabulary in order: 256 bytes, the same at the end of a word, the merges, two specials."""
    merges = [(a, b) for a, b in (line.split(" ") for line in _data("clip_merges.txt.xz").splitlines())]
    symbols = _clip_bytes()
    words = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.add_special_tokens([AddedToken(t) for t in ("<|startoftext|>", "<|endoftext|>")])
    return tokenizer


@functools.cache
def _t5_vocabulary() -> Tokenizer:
    return Tokenizer.from_str(_data("t5.json.xz"))


def _clip_bytes() -> list[str]:
    """The printable stand-ins for the 256 bytes, in the order of GPT-2's table (Radford et al. 2019)."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [chr(code) for first, last in ranges for code in range(ord(first), ord(last) + 1)]
    return printable + [chr(256 + number) for number in range(256 - len(printable))]


def _data(name: str) -> str:
    packed = resources.files("usoflow.models").joinpath("tokenizers", name).read_bytes()
    return lzma.decompress(packed).decode("utf-8")

"""The editor's text processing."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usoflow.workflow.text import fill_placeholders, first_alternatives, strip_comments

NOW = datetime(2026, 3, 4, 15, 6, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a {day|night} b", "a day b"),
        ("{a|b} {c|d}", "a c"),
        ("{a {b|c}|d}", "a b"),
        ("{{a|b}|c}", "a"),
        ("{|b}", ""),
        ("{one}", "one"),
        (r"\{a|b\}", "{a|b}"),
        (r"{a\|b|c}", "a|b"),
        ("{open|ended", "open"),  # from here on as editor 1.58.1 was seen to do
        ("{open {a|b}", "open a"),
        ("{a|{b", "a"),
        ("a{b}c}d", "abc}d"),
        (r"\\{a|b}", r"\\a"),
        (r"\\\{a", r"\\{a"),
        (r"{\\|b}", r"\\"),
        (r"\\|", r"\|"),
        ("a|b}", "a|b}"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_first_alternatives(text: str, expected: str) -> None:
    assert first_alternatives(text)[0] == expected


@given(st.text(alphabet="ab{|}\\", max_size=60))
@settings(deadline=None)
def test_any_braces(text: str) -> None:
    result, chosen = first_alternatives(text)
    assert not chosen or "|" in text
    assert len(result) <= len(text)
    if not set(text) & set("{}|"):
        assert result == text


def test_many_braces_take_no_time() -> None:
    assert first_alternatives("{" * 50_000 + "}" * 50_000) == ("", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a // b\nc", "a \nc"),
        ("a /* b\nc */ d", "a  d"),
        ("see https://x.y/z now", "see https:"),
        ("a /* open", "a /* open"),
    ],
)
def test_strip_comments(text: str, expected: str) -> None:
    assert strip_comments(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%date:yyyy-MM-dd%/x", "2026-03-04/x"),
        ("%date:yy.M.d_hhmmss%", "26.3.4_150607"),
        ("%date:h-m-s%", "15-6-7"),
        ("%KSampler.seed%_a", "5_a"),
        ("%KSampler.other% %width%", "%KSampler.other% %width%"),
        ("%My.Node.text%", "a_b_c"),
        ("100% of 5%", "100% of 5%"),
    ],
)
def test_placeholders(text: str, expected: str) -> None:
    known = {("KSampler", "seed"): "5", ("My.Node", "text"): "a/b:c"}
    assert fill_placeholders(text, NOW, lambda *key: known.get(key)) == expected

"""What the editor does to texts before it sends them: comments, {a|b} alternatives, %placeholders%.

The syntax is described in ComfyUI's README (dynamic prompts) and its community manual (file names).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Final

FILE_NAME: Final = "filename_prefix"  # the input that may hold %placeholders%

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_TOKEN = re.compile(r"\\.|[{}|\\]|[^{}|\\]+", re.DOTALL)
_ESCAPED = re.compile(r"\\([{}|])")
_SPECIAL = re.compile(r"[{}|]")
_PLACEHOLDER = re.compile(r"%([^%]+)%")
_DATE_PART = re.compile(r"yyyy|yy|MM|M|dd|d|hh|h|mm|m|ss|s")
_UNSAFE = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')


def strip_comments(text: str) -> str:
    """Remove /* ... */ and // to the end of the line, in a URL too, as the editor does."""
    return _COMMENT.sub("", text)


def first_alternatives(text: str) -> tuple[str, bool]:
    r"""Replace each {a|b|...}, nested or not, by its first alternative; \{ \| \} are those characters.

    Returns the text, and whether there was anything to choose.
    The editor draws one at random each time; a converter that gives another prompt each time could not be
    tested nor its pictures reproduced. What is not closed reaches to the end.
    """
    levels = [_Level()]
    chosen = False
    for token in _TOKEN.findall(text):
        if token == "{":
            levels.append(_Level())
        elif token == "}" and len(levels) > 1:
            chosen |= _close(levels)
        elif token == "|" and len(levels) > 1:
            levels[-1].separated = True
        else:
            levels[-1].add(token)
    while len(levels) > 1:
        chosen |= _close(levels)
    return _ESCAPED.sub(r"\1", "".join(levels[0].first)), chosen


def escaped(text: str) -> str:
    r"""The text, written so that `first_alternatives` gives it back (what has \{ in it cannot be)."""
    return text if first_alternatives(text)[0] == text else _SPECIAL.sub(r"\\\g<0>", text)


class _Level:
    """The first alternative since an opening brace."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.separated = False

    def add(self, text: str) -> None:
        if not self.separated:
            self.first.append(text)


def _close(levels: list[_Level]) -> bool:
    """Put the innermost level's first alternative into the one around it; whether there were others."""
    closed = levels.pop()
    levels[-1].add("".join(closed.first))
    return closed.separated


def fill_placeholders(text: str, now: datetime, lookup: Callable[[str, str], str | None]) -> str:
    """Fill %date:FORMAT% and %Node.widget% in a file name prefix.

    What `lookup(node, widget)` does not know, and names without a dot (%width%), stay for the saving node.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith("date:"):
            return _date(name.removeprefix("date:"), now)
        node, dot, widget = name.rpartition(".")
        found = lookup(node, widget) if dot else None
        return match[0] if found is None else _UNSAFE.sub("_", found)

    return _PLACEHOLDER.sub(fill, text)


def _date(pattern: str, now: datetime) -> str:
    values = {
        "yy": now.year % 100,
        "M": now.month,
        "d": now.day,
        "h": now.hour,
        "m": now.minute,
        "s": now.second,
    }

    def part(match: re.Match[str]) -> str:
        token = match[0]
        if token == "yyyy":
            return f"{now.year:04}"
        value = values.get(token, values.get(token[0], 0))
        return f"{value:0{len(token)}}"

    return _DATE_PART.sub(part, pattern)


def as_the_editor_writes(value: object) -> str:
    """A field's value in a file name: 8.0 is 8 there, and False false."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)

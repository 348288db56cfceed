"""Options that take several words (`--subject one.png two.png`), or a number or none (`--easycache`).

Typer's options take one word each and may be repeated. `SeveralWords` writes such a command line out: the
words after the command's argument belong to the option before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, ClassVar

from typer.core import TyperCommand


class SeveralWords(TyperCommand):
    """A command of one argument, whose repeatable options take several words once the argument was given."""

    bare: ClassVar[Mapping[str, str]] = MappingProxyType({})  # what an option without its number means

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line."""
        options: list[Any] = [parameter for parameter in self.params if parameter.param_type_name == "option"]
        valued = {name for option in options if not option.is_flag for name in option.opts}
        repeatable = {name for option in options if option.multiple for name in option.opts}
        ctx.allow_extra_args = True  # refused below, in better words
        rest = super().parse_args(ctx, list(written_out(args, valued, repeatable, self.bare)))
        if ctx.args:
            begins_with_words = args[0].partition("=")[0] in repeatable
            ctx.fail(self.order(ctx) if begins_with_words else self.too_many(ctx))
        return rest

    def order(self, ctx: Any) -> str:
        """What is wrong where an option of several words comes before the command's argument."""
        (first,) = (part.name for part in self.params if part.param_type_name == "argument")
        return f"{' '.join(ctx.args)}: {first.upper()} comes first, and then options of several words."

    def too_many(self, ctx: Any) -> str:
        """What is wrong where there are more words than one and those of options."""
        return f"Unexpected arguments: {' '.join(ctx.args)}"


def written_out(
    words: Sequence[str], valued: Set[str], repeatable: Set[str], bare: Mapping[str, str]
) -> Iterator[str]:
    """The same command line with every option named before each of its words.

    Args:
        words: as the shell gives them.
        valued: options that take a word.
        repeatable: those of them that take several.
        bare: the word that stands in where an option has none that is a number.
    """
    waiting = current = ""  # an option whose word comes next; one that takes further ones
    has_argument = False
    for place, word in enumerate(words):
        if waiting in bare and not _is_number(word):
            yield bare[waiting]
            waiting = ""
        if waiting:
            waiting = ""
        elif word == "--":
            yield from words[place:]
            return
        elif word.startswith("-") and word != "-" and not _is_number(word):
            name, equals, _ = word.partition("=")
            waiting = name if name in valued and not equals else ""
            current = name if name in repeatable else ""
        elif current and has_argument:
            yield current
        else:
            has_argument, current = True, ""
        yield word
    if waiting in bare:
        yield bare[waiting]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True

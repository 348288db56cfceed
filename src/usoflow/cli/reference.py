"""The reference of the command line, from its functions: `python -m usoflow.cli.reference > docs/cli.md`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import EnumType, StrEnum
from typing import Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from usoflow.cli.main import HELP, app
from usoflow.errors import CATALOGUE

HEAD = """# Command line

Made by `python -m usoflow.cli.reference > docs/cli.md`; `usoflow COMMAND --help` says the same.
"""


def reference() -> str:
    """Every command with its arguments and options, and every error, as Markdown."""
    return "\n".join([HEAD, HELP, *_group("usoflow", app), *_errors()]) + "\n"


def _group(name: str, group: typer.Typer) -> Iterator[str]:
    """What a group does by itself, if anything, and its commands."""
    own = group.registered_callback
    if own is not None and own.callback is not None:
        yield from _command(name, own.callback)
    for command in group.registered_commands:
        assert command.callback is not None
        yield from _command(f"{name} {command.name or command.callback.__name__}", command.callback)
    for child in group.registered_groups:
        assert child.typer_instance is not None
        yield from _group(f"{name} {child.name}", child.typer_instance)


def _command(name: str, function: Callable[..., Any]) -> Iterator[str]:
    hints = get_type_hints(function, include_extras=True)
    described = [(p, *_info(hints[p.name])) for p in inspect.signature(function).parameters.values()]
    rows = [(p, type_, info) for p, type_, info in described if info is not None]
    words = [_word(p) for p, _, info in rows if isinstance(info, ArgumentInfo)]
    yield "\n\n".join(filter(None, (f"\n## `{' '.join([name, *words])}`", inspect.getdoc(function)))) + "\n"
    yield "| | | default |\n|---|---|---|"
    for parameter, type_, info in rows:
        yield f"| {_label(parameter, type_, info)} | {_cell(info.help or '')} | {_default(parameter)} |"


def _errors() -> Iterator[str]:
    """All that can go wrong, as `--json` and the server name it."""
    yield "\n## Errors\n\nAs `--json` and the server name them; messages also tell which file, node, value.\n"
    yield "Pictures that a run saved before it failed are printed first; with `--json`, in `error.images`.\n"
    yield "| code | what it means | what to do | exit status |\n|---|---|---|---|"
    for code, kind in CATALOGUE.items():
        yield f"| `{code}` | {_cell(kind.meaning)} | {_cell(kind.remedy)} | {kind.exit_code} |"


def _info(hint: Any) -> tuple[Any, ArgumentInfo | OptionInfo | None]:
    """The type of a parameter and what typer is told about it; None for what is no parameter to a user."""
    type_, *metadata = get_args(hint) or (hint,)
    found = [item for item in metadata if isinstance(item, ArgumentInfo | OptionInfo)]
    return type_, found[0] if found else None


def _word(parameter: inspect.Parameter) -> str:
    word = parameter.name.upper()
    return word if parameter.default is inspect.Parameter.empty else f"[{word}]"


def _label(parameter: inspect.Parameter, type_: Any, info: ArgumentInfo | OptionInfo) -> str:
    if isinstance(info, ArgumentInfo):
        return f"`{parameter.name.upper()}`"
    names = ", ".join(_names(info) or ["--" + parameter.name.replace("_", "-")])
    one, many = _single(type_)
    if one is bool and parameter.default is True:  # typer adds what switches it off
        names += names.replace("--", "/--no-", 1)
    value = "" if one is bool else " " + (info.metavar or _value(one))
    return f"`{_cell(names + value)}`{' (several)' if many else ''}"


def _names(info: OptionInfo) -> list[str]:
    """As given; within Annotated, typer keeps the first where the default would be."""
    first = [info.default] if isinstance(info.default, str) else []
    return [*first, *(info.param_decls or ())]


def _single(type_: Any) -> tuple[Any, bool]:
    """`list[X] | None` -> (X, True); `X | None` -> (X, False)."""
    members = [item for item in get_args(type_) if item is not type(None)]
    bare = members[0] if members and get_origin(type_) is not list else type_
    return (get_args(bare)[0], True) if get_origin(bare) is list else (bare, False)


def _value(type_: Any) -> str:
    if isinstance(type_, EnumType) and issubclass(type_, StrEnum):
        return "|".join(member.value for member in type_)
    return {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "Path": "PATH"}.get(type_.__name__, "VALUE")


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default in (inspect.Parameter.empty, None, False):
        return ""
    return f"`{parameter.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(reference(), end="")

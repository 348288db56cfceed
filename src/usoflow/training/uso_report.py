"""The tables and pictures of `usoflow evaluate`: every cell, every row, as Markdown, JSON and contact sheets.

Asks `uso_evaluate` for everything, and decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from usoflow.durable import sha256
from usoflow.training.drawings import Sprites
from usoflow.training.triplets import lesson_sheet
from usoflow.training.uso_evaluate import CELLS, Contender, Marks, bounds, contenders, marks, questions
from usoflow.training.uso_judge import UsoJudge

COLUMNS = ("subject", "style", "background", "moved", "leaked", "all")
SHOWN = 16  # questions on a sheet


def evaluate(
    contender: Contender,
    judge: UsoJudge,
    sprites: Sprites,
    *,
    count: int,
    output: Path,
    say: Callable[[str], None],
) -> dict[str, dict[str, Marks]]:
    """Ask everything; write `evaluation.json`, `evaluation.md` and a sheet per cell as they are done.

    Args:
        contender: who is asked.
        judge: who marks.
        sprites: drawings for questions and targets.
        count: questions of each cell.
        output: folder for what is written.
        say: told each row when it is done.

    Returns:
        Marks by cell and row.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = {path.name: sha256(path) for path in contender.files}
    tables: dict[str, dict[str, Marks]] = {}
    for name, cell in CELLS.items():
        asked = questions(sprites.world, cell, count)
        rows: dict[str, Marks] = tables.setdefault(name, {})
        for row, given in contenders(cell.use).items():
            pictures = contender.answer(sprites, asked, given)
            rows[row] = marks(judge, sprites.world, asked, pictures)
            say(f"{name}, {row}: {in_words(rows[row])}")
            sheet = output / f"{_file(name)}-{_file(row)}.png"
            lesson_sheet(sheet, sprites, asked[:SHOWN], pictures[:SHOWN], columns=8)
        rows |= bounds(judge, sprites, asked, contender.side)
        (output / "evaluation.json").write_text(
            json.dumps({"count": count, "files": files} | tables, indent=1), "utf-8"
        )
        (output / "evaluation.md").write_text(as_markdown(tables, count), "utf-8")
    return tables


def as_markdown(tables: Mapping[str, Mapping[str, Marks]], count: int) -> str:
    """One table per cell, in per cent."""
    parts = [f"Questions of each cell: {count}. Shares in %.\n"]
    for name, rows in tables.items():
        parts.append(f"## {name}\n\n| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
        parts += [
            f"| {row} | {' | '.join(_cell(found, c) for c in COLUMNS)} |" for row, found in rows.items()
        ]
        parts.append("")
    return "\n".join(parts)


def in_words(found: Marks) -> str:
    """'subject 81 %, style 12 %'."""
    return ", ".join(f"{name} {100 * found[name]:.0f} %" for name in COLUMNS if name in found)


def _cell(found: Marks, column: str) -> str:
    return f"{100 * found[column]:.1f}" if column in found else ""


def _file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")

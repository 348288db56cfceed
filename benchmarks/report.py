"""What was measured, as text, Markdown, JSON and plots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Plot:
    """Lines y over x, by name, on logarithmic axes if wanted."""

    x_label: str
    y_label: str
    lines: dict[str, tuple[list[float], list[float]]]
    logarithmic: bool = False


@dataclass(frozen=True)
class Table:
    """One measurement.

    Attributes:
        title, columns, rows: as printed.
        how: what was measured, and how.
        raw: every figure, for the JSON.
        plots: drawn beside it.
    """

    title: str
    how: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    raw: Any = None
    plots: dict[str, Plot] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table with its title."""
        lines = [
            f"## {self.title}",
            "",
            self.how,
            "",
            _line(self.columns),
            _line("---" for _ in self.columns),
        ]
        lines += [_line(row) for row in self.rows]
        return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Where it was measured, and how busy that was."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "processor": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load at start": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write(folder: Path, tables: Sequence[Table], where: dict[str, Any], command: str) -> None:
    """`report.md`, `report.json` and `*.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    head = ["# Measured", "", f"`{command}`", "", ", ".join(f"{k}: {v}" for k, v in where.items()), ""]
    body = [part for table in tables for part in (table.markdown(), *_drawn(folder, table))]
    (folder / "report.md").write_text("\n".join([*head, *body]), encoding="utf-8")
    record = {"command": command, "machine": where, "tables": [_plain(asdict(table)) for table in tables]}
    (folder / "report.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _drawn(folder: Path, table: Table) -> list[str]:
    for name, plot in table.plots.items():
        _draw(folder / f"{name}.svg", plot)
    return [f"![{plot.y_label} over {plot.x_label}]({name}.svg)\n" for name, plot in table.plots.items()]


def _draw(path: Path, plot: Plot) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, (x, y) in plot.lines.items():
        axes.plot(x, y, marker="o", label=name)
    if plot.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def _line(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))

"""Pictures to look at: contact sheets and loss curves, written as PNG while training runs.

Called by the training stages and by `usoflow train render`; reads arrays and loss logs, decides nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Picture = npt.NDArray[np.float32]
LINE_HEIGHT = 12


def contact_sheet(
    path: Path, pictures: Sequence[Picture], labels: Sequence[str] = (), *, columns: int, zoom: int = 2
) -> None:
    """Write pictures ([S, S, 3] in 0..1) in rows, each with its label (may be fewer) below."""
    side = pictures[0].shape[0] * zoom
    text = LINE_HEIGHT * 3 + 2 if labels else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + text + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = i % columns * (side + 4), i // columns * (side + text + 4)
        image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        if i < len(labels):
            label = "\n".join(textwrap.wrap(labels[i], side // 6)[:3])
            pen.text((x, y + side), label, fill="black", spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def loss_curve(path: Path, steps: Sequence[float], losses: Sequence[float], *, title: str) -> None:
    """Write a loss curve, smoothed beside the raw values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.3)
    width = max(len(losses) // 50, 1)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth)
    axes.set(title=title, xlabel="samples", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path)

"""`usoflow.generate`: one picture in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from usoflow.api.engine import Engine, Result

if TYPE_CHECKING:
    from usoflow.api.engine import Lora, Picture
    from usoflow.execution.progress import Cancellation, Event


def generate(
    prompt: str,
    *,
    subject: Sequence[Picture] | Picture | None = None,
    style: Sequence[Picture] | Picture | None = None,
    size: tuple[int, int] | None = None,
    steps: int = 20,
    guidance: float = 3.5,
    seed: int | None = None,
    subject_size: int | None = None,
    keep_size: bool = False,
    easycache: float | None = None,
    loras: Sequence[Lora] | Lora = (),
    models: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    vram: str | None = None,
    progress: Callable[[Event], None] | None = None,
    cancellation: Cancellation | None = None,
) -> Result:
    """One picture by the official USO workflow, with models that are loaded for it alone.

    For more than one picture use `Engine`, which keeps them. The first arguments are those of
    `Engine.generate`, the others those of `Engine`.

    Raises:
        UsoflowError: what is wrong, and what to do about it.
    """
    with Engine(models=models, output=output, device=device, dtype=dtype, vram=vram) as engine:
        return engine.generate(
            prompt,
            subject=subject,
            style=style,
            size=size,
            steps=steps,
            guidance=guidance,
            seed=seed,
            subject_size=subject_size,
            keep_size=keep_size,
            easycache=easycache,
            loras=loras,
            progress=progress,
            cancellation=cancellation,
        )

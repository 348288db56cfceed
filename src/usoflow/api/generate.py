"""`usoflow.generate`: one picture in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from usoflow.api.engine import Asked, Engine
from usoflow.api.result import Result

if TYPE_CHECKING:
    from usoflow.execution.progress import Cancellation, Event


def generate(
    prompt: str,
    *,
    models: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    vram: str | None = None,
    compiled: bool | None = None,
    progress: Callable[[Event], None] | None = None,
    cancellation: Cancellation | None = None,
    **asked: Unpack[Asked],
) -> Result:
    """One picture by the official USO workflow, with models that are loaded for it alone.

    For more than one picture use `Engine`, which keeps them.

    Args:
        prompt: what it shows.
        models, output, device, dtype, vram, compiled: as for `Engine`.
        progress, cancellation: as for `Engine.run`.
        asked: as for `Engine.workflow`: subject, style, size, steps, guidance, seed, ...

    Raises:
        UsoflowError: what is wrong, and what to do about it.
    """
    with Engine(
        models=models, output=output, device=device, dtype=dtype, vram=vram, compiled=compiled
    ) as engine:
        return engine.generate(prompt, progress=progress, cancellation=cancellation, **asked)

"""Places that may not be looked into, for tests that root runs too, whom no permission holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def forbid(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """As of a folder of another user: nobody learns anything of what is in it, by a link neither."""
    ask = os.stat

    def refused(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and place in Path(os.path.realpath(path)).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return ask(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refused)

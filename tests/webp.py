"""EXIF of a WebP as ComfyUI writes workflows into it; usoflow only reads such."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL.Image import Exif

PROMPT, FIRST_OF_OTHERS = 0x0110, 0x010F  # tags; further entries count down


def webp_exif(prompt: object, extra: Mapping[str, Any]) -> bytes:
    """For Pillow's `save(..., exif=...)`: the prompt and the entries of `extra`."""
    exif = Exif()
    exif[PROMPT] = f"prompt:{json.dumps(prompt)}"
    for tag, (key, value) in zip(range(FIRST_OF_OTHERS, 0, -1), extra.items(), strict=False):
        exif[tag] = f"{key}:{json.dumps(value)}"
    return exif.tobytes()

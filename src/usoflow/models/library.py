"""Models by file, each loaded once: what loader nodes name, the nodes that compute get here.

A handle (nodes/handles.py) names components of files and adapters; the library keeps one module for each
component, and one view of the transformer for each set of LoRAs, which shares the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from usoflow.models import flux, style_projector, t5, text, vae, vision
from usoflow.models.checkpoint import Component
from usoflow.models.lora import attach
from usoflow.models.placement import Placement
from usoflow.models.weights import Linear, build

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class LoraUse:
    """A LoRA file and its strength."""

    lora: Component
    strength: float

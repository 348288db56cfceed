"""A training file: what each stage is told.

Read by `usoflow train`; `configs/pocket.toml`, the default, made the shipped weights.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from usoflow.errors import UsoflowError
from usoflow.training.autoencoder import VaeStage
from usoflow.training.base import BaseStage
from usoflow.training.loop import Recipe
from usoflow.training.redraw import RedrawStage
from usoflow.training.reward import RewardStage
from usoflow.training.tower import TowerStage
from usoflow.training.uso import UsoStage


@dataclass(frozen=True, slots=True)
class Plan:
    """One section per stage that has settings."""

    vae: VaeStage
    base: BaseStage
    tower: TowerStage
    redraw: RedrawStage
    uso: UsoStage
    reward: RewardStage
    judge: Recipe
    uso_judge: Recipe

    @classmethod
    def read(cls, path: Path | None) -> Plan:
        """Read a TOML file; without one, the plan that made the shipped weights.

        Raises:
            UsoflowError: "training_config" naming what is wrong.
        """
        shipped = resources.files("usoflow.training").joinpath("configs", "pocket.toml")
        try:
            data = tomllib.loads((path or shipped).read_text("utf-8"))
            return cls(
                VaeStage(**_section(data["vae"])),
                BaseStage(**_section(data["base"])),
                TowerStage(**_section(data["tower"])),
                RedrawStage(**_section(data["redraw"])),
                UsoStage(**_section(data["uso"])),
                RewardStage(**_section(data["reward"])),
                Recipe(**data["judge"]),
                Recipe(**data["uso_judge"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsoflowError("training_config", f"{path}: {error}.") from None


def _section(section: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's arguments: its tables are recipes, its lists tuples."""
    return {name: _value(value) for name, value in section.items()}


def _value(value: Any) -> Any:
    match value:
        case dict():
            return Recipe(**value)
        case list():
            return tuple(_value(item) for item in value)
    return value

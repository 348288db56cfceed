"""A training file: what each stage is told.

Read by `usoflow train`; the default, `configs/pocket.toml`, is the recipe of the shipped weights
(docs/pocket.md tells where their way differed).
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from usoflow.errors import UsoflowError
from usoflow.training.autoencoder import VaeStage
from usoflow.training.base import BaseStage
from usoflow.training.loop import Recipe
from usoflow.training.redraw import RedrawStage
from usoflow.training.reward import RewardStage
from usoflow.training.tower import TowerStage
from usoflow.training.uso import RewardedStage, UsoStage


@dataclass(frozen=True, slots=True)
class Plan:
    """One section per stage that has settings."""

    vae: VaeStage
    base: BaseStage
    tower: TowerStage
    redraw: RedrawStage
    uso: UsoStage
    reward: RewardStage
    content: RewardStage
    rewarded: RewardedStage
    judge: Recipe
    uso_judge: Recipe

    @classmethod
    def read(cls, path: Path | None) -> Plan:
        """Read a TOML file; without one, the recipe of the shipped weights.

        Raises:
            UsoflowError: "training_config" naming everything that is wrong.
        """
        shipped = resources.files("usoflow.training").joinpath("configs", "pocket.toml")
        try:
            said = tomllib.loads((path or shipped).read_text("utf-8"))
            plan = TypeAdapter(cls).validate_python(said)
            wrong = [f"{name}: no such setting" for name in _unknown(said, dataclasses.asdict(plan))]
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()]
        except (OSError, ValueError) as error:
            wrong = [str(error)]
        if wrong:
            raise UsoflowError("training_config", f"{path}: {'; '.join(wrong)}.")
        return plan


def _unknown(said: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """What is said and not known, by full names."""
    for name, value in said.items():
        if name not in known:
            yield name
        elif isinstance(value, dict):
            yield from (f"{name}.{part}" for part in _unknown(value, known[name]))

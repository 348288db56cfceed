"""The training loop of every stage: AdamW, warm-up and cosine, EMA, a log, and a state that resumes exactly.

A stage gives its parameters and a function from the running sample number to a loss; batches follow from
that number alone (see `scenes`), so an interrupted run continues as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from usoflow.errors import UsoflowError

LossFunction = Callable[[int], Tensor]  # number of samples before this batch -> scalar loss


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast to learn.

    Attributes:
        samples: length of the run; the learning rate ends there.
        batch: samples per step.
        rate: highest learning rate.
        final_rate: fraction of `rate` at the end.
        warmup: samples until the highest rate.
        decay: AdamW's weight decay, for matrices only.
        ema: half-life of the averaged weights in samples; the shipped weights are the averaged ones.
        seed: of weights and data.
        save_every: samples between saved states.
    """

    samples: int
    batch: int
    rate: float
    final_rate: float = 0.05
    warmup: int = 2000
    decay: float = 0.01
    ema: int = 20_000
    seed: int = 0
    save_every: int = 10_000

    def rate_at(self, done: int) -> float:
        """Learning rate after `done` samples: linear warm-up, then half a cosine."""
        if done < self.warmup:
            return self.rate * (done + self.batch) / (self.warmup + self.batch)
        progress = min((done - self.warmup) / max(self.samples - self.warmup, 1), 1.0)
        return self.rate * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2)


class Training:
    """Parameters under training, their optimiser, their average and how far they are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe, folder: Path) -> None:
        self.parameters, self.recipe, self.folder = dict(parameters), recipe, folder
        self.done = 0
        self.seconds = 0.0
        self.log: list[tuple[int, float]] = []
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        vectors = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.99), fused=True)

    def run(self, loss_of: LossFunction, *, after_save: Callable[[], None], until: int | None = None) -> None:
        """Train until the recipe's end (or `until` samples), saving on the way and at the end."""
        end = min(self.recipe.samples, until or self.recipe.samples)
        while self.done < end:
            saved = self.done // self.recipe.save_every
            self.step(loss_of)
            if self.done // self.recipe.save_every != saved or self.done >= end:
                self.save()
                after_save()

    def step(self, loss_of: LossFunction) -> float:
        """One step of the optimiser; returns the loss.

        Raises:
            UsoflowError: "non_finite" if the loss is no number.
        """
        start = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate_at(self.done)
        loss = loss_of(self.done)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UsoflowError("non_finite", f"The loss is {value} after {self.done} samples.")
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._average()
        self.done += self.recipe.batch
        self.seconds += time.monotonic() - start
        self.log.append((self.done, value))
        return value

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average; its half-life grows with the run until it is the recipe's."""
        half_life = max(min(self.recipe.ema, self.done // 8), 1)
        weight = 1 - 0.5 ** (self.recipe.batch / half_life)
        values = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), values, weight)

    def save(self) -> None:
        """Write the state and the log; the old state is replaced only by a complete new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "done": self.done,
            "seconds": self.seconds,
            "log": self.log,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }
        torch.save(state, self.folder / "state.part")
        os.replace(self.folder / "state.part", self.folder / "state.pt")
        speed = self.done / max(self.seconds, 1e-9)
        recent = [loss for _, loss in self.log[-200:]]
        line = {"done": self.done, "seconds": round(self.seconds), "per_second": round(speed, 1)}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line | {"loss": round(sum(recent) / len(recent), 5)}) + "\n")

    def resume(self) -> bool:
        """Continue from the folder's state, if there is one; the recipe may be longer than it was."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
                self.average[name].copy_(state["average"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.done, self.seconds = state["done"], state["seconds"]
        self.log = [(int(done), float(loss)) for done, loss in state["log"]]
        return True


@torch.no_grad()
def swap(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `values` into the parameters and return what was in them: to look at averaged weights."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
    return before

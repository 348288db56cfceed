"""The training loop of every stage: Muon and AdamW, warm-up and decay, EMA, a log, an exact resume.

A stage gives its parameters and a function from the running sample number to a loss; batches follow from
that number alone (see `scenes`), so an interrupted run continues as if nothing had happened.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from usoflow.errors import UsoflowError
from usoflow.models.placement import is_out_of_memory
from usoflow.training.states import read_state, require_finite_weights, require_settings, write_state

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

CPU = torch.device("cpu")
READ_EVERY = 16  # steps
LossFunction = Callable[[int], Tensor]  # number of samples before this batch -> scalar loss
# Parts of names of the matrices that AdamW keeps: tables, layers that touch latents or words, modulations,
# and, by the names of their modules, all of the style projector (`feature_embedder`) and of CLIP
# (`text_model`, which has "mod" in it): with these the shipped weights were trained.
AT_EDGE = ("embed", "shared", "bias", "conv_in", "conv_out", "img_in", "txt_in", "final_layer", "mod")

# What to do where losses or weights are no numbers.
AGAIN = (
    "Run the stage again: it goes on from its last saved state. If that does not help, move {} away and begin"
    " anew with a lower {}."
)
AGAIN_HERE = AGAIN.format("its folder", "rate, or with --full-precision")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast to learn.

    Attributes:
        samples: length of the run; the learning rate ends there.
        batch: samples per step.
        rate: highest learning rate of AdamW and, since its steps are scaled to AdamW's size, of Muon.
        steady: fraction of the run after which the rate falls, linearly.
        final_rate: fraction of `rate` at the end.
        warmup: samples until the highest rate.
        decay: weight decay, for matrices only.
        ema: half-life of the averaged weights in samples; the shipped weights are the averaged ones.
        seed: of first weights and of noise; the order of cached pictures has a seed of its own.
        save_every: samples between saved states.
    """

    samples: int
    batch: int
    rate: float
    steady: float = 0.5
    final_rate: float = 0.02
    warmup: int = 2000
    decay: float = 0.01
    ema: int = 20_000
    seed: int = 0
    save_every: int = 10_000

    def __post_init__(self) -> None:
        """Raises ValueError for a run that would never end, or learn nothing."""
        if min(self.samples, self.batch, self.save_every, self.ema) < 1:
            raise ValueError("samples, batch, save_every and ema must be at least 1")
        if not (self.rate > 0 and 0 <= self.steady <= 1 and 0 <= self.final_rate <= 1):
            raise ValueError("rate must be above 0, steady and final_rate between 0 and 1")
        if min(self.warmup, self.decay, self.seed) < 0:
            raise ValueError("warmup, decay and seed must not be below 0")

    def rate_at(self, done: int) -> float:
        """Learning rate after `done` samples: linear warm-up, steady, linear decay.

        With this shape (arXiv:2405.18392) a run may be given another length at any time before it decays.
        """
        if done < self.warmup:
            return self.rate * (done + self.batch) / (self.warmup + self.batch)
        left = (self.samples - done) / max(self.samples * (1 - self.steady), 1)
        return self.rate * min(max(left, self.final_rate), 1.0)


class Optimisers:
    """Muon (torch's, after Keller Jordan, 2024) for the hidden matrices but CLIP's, AdamW for all else.

    A convolution is to Muon the matrix [out, in * k * k]: a view that shares the parameter's memory. On the
    pocket autoencoder the same time gave 24.2 dB with Muon and 19.3 dB with AdamW alone.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> None:
        hidden = {n: p for n, p in parameters.items() if p.ndim > 1 and not _at_edge(n)}
        rest = [p for n, p in parameters.items() if n not in hidden]
        self.pairs = [(p, p.detach().view(len(p), -1)) for p in hidden.values()]
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adam_groups(rest, recipe), lr=recipe.rate, betas=(0.9, 0.99), fused=True)
        ]
        if self.pairs:
            matrices = [matrix for _, matrix in self.pairs]
            self.all.append(
                torch.optim.Muon(matrices, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, rate: float) -> None:
        """Apply and clear the gradients."""
        for parameter, matrix in self.pairs:
            matrix.grad = None if parameter.grad is None else parameter.grad.view_as(matrix)
            parameter.grad = None
        for optimiser in self.all:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """What `load` takes."""
        return [optimiser.state_dict() for optimiser in self.all]

    def load(self, states: list[dict[str, Any]]) -> None:
        """Continue from a saved state, with the recipe's weight decay."""
        for optimiser, state in zip(self.all, states, strict=True):
            decays = [group["weight_decay"] for group in optimiser.param_groups]
            optimiser.load_state_dict(state)
            for group, decay in zip(optimiser.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def adam_groups(parameters: Sequence[nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """For AdamW: weight decay for matrices only."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _at_edge(name: str) -> bool:
    return any(part in name for part in AT_EDGE)


class Training:
    """Parameters under training, their optimiser, their average and how far they are.

    Args:
        parameters: what learns.
        recipe: length and speed.
        folder: where the state is kept.
        made_with: tells apart what else took part and does not learn (`kept.fingerprint`).
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], recipe: Recipe, folder: Path, *, made_with: str = ""
    ) -> None:
        self.parameters, self.recipe, self.folder = dict(parameters), recipe, folder
        self.settings: dict[str, Any] = {
            "batch": recipe.batch, "seed": recipe.seed, "frozen weights": made_with,
        }  # fmt: skip
        self.done = 0
        self.seconds = 0.0
        self.log: list[tuple[int, float]] = []
        self._new: list[tuple[int, Tensor]] = []
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimisers = Optimisers(self.parameters, recipe)

    def run(self, loss_of: LossFunction, *, after_save: Callable[[], None], until: int | None = None) -> None:
        """Train until the recipe's end (or `until` samples), saving on the way and at the end."""
        end = min(self.recipe.samples, until or self.recipe.samples)
        while self.done < end:
            saved = self.done // self.recipe.save_every
            self.step(loss_of)
            if self.done // self.recipe.save_every != saved or self.done >= end:
                self.save()
                after_save()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of those that learn, for as long as they are looked at."""
        learning = swap(self.parameters, self.average)
        try:
            yield
        finally:
            swap(self.parameters, learning)

    def step(self, loss_of: LossFunction) -> Tensor:
        """One step of the optimiser; returns the loss."""
        start = time.monotonic()
        loss = loss_of(self.done)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimisers.step(self.recipe.rate_at(self.done))
        self._average()
        self.done += self.recipe.batch
        self._new.append((self.done, loss.detach()))
        if len(self._new) == READ_EVERY:
            self._read()
        self.seconds += time.monotonic() - start
        return loss.detach()

    def _read(self) -> None:
        """Put the losses of the last steps into the log: reading one waits for the device.

        Raises:
            UsoflowError: "non_finite" if one is no number.
        """
        for done, loss in self._new:
            self.log.append((done, float(loss)))
            if not math.isfinite(self.log[-1][1]):
                raise UsoflowError(
                    "non_finite", f"The loss is {float(loss)} after {done} samples.", remedy=AGAIN_HERE
                )
        self._new.clear()

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average; its half-life grows with the run until it is the recipe's."""
        half_life = max(min(self.recipe.ema, self.done // 8), 1)
        weight = 1 - 0.5 ** (self.recipe.batch / half_life)
        values = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), values, weight)

    def save(self) -> None:
        """Write state and log, and tell how far it is; an old state is replaced only by a complete new one.

        Raises:
            UsoflowError: "non_finite" if a loss or a weight is no number.
        """
        self._read()
        require_finite_weights([*self.parameters.values(), *self.average.values()], self.done, AGAIN_HERE)
        self.folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "done": self.done,
            "settings": self.settings,
            "seconds": self.seconds,
            "log": self.log,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimisers": self.optimisers.state(),
        }
        write_state(self.folder / "state.pt", state)
        speed = self.done / max(self.seconds, 1e-9)
        recent = [loss for _, loss in self.log[-200:]]
        loss = round(sum(recent) / len(recent), 5)
        line = {
            "done": self.done, "seconds": round(self.seconds), "per_second": round(speed, 1), "loss": loss,
        }  # fmt: skip
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        logger.info("%s: %d samples, %.0f a second, loss %s", self.folder.name, self.done, speed, loss)

    def resume(self) -> bool:
        """Continue from the folder's state, if there is one; the recipe may be another.

        Raises:
            UsoflowError: "training_config" if its batch or seed differs, what learns is of other names or
                shapes, or what takes part and does not learn is another.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        with read_state(path) as state:
            require_settings(state, self.settings)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(state["parameters"][name])
                    self.average[name].copy_(state["average"][name])
            self.optimisers.load(state["optimisers"])
        self.done, self.seconds = state["done"], state["seconds"]
        self.log = [(int(done), float(loss)) for done, loss in state["log"]]
        return True


def trained(
    network: M,
    recipe: Recipe,
    folder: Path,
    lessons: Callable[[], AbstractContextManager[LossFunction]],
    after_save: Callable[[Training], None] = lambda training: None,
) -> M:
    """Train a network to the recipe's end, from wherever its folder is; with averaged weights, frozen.

    Args:
        network: with its first weights; what of it needs no gradient does not learn.
        recipe: length and speed.
        folder: where the state is kept.
        lessons: gives the loss, and takes away at the end what was drawn for it; not asked if all is learnt.
        after_save: told at each saved state.
    """
    training = Training({n: p for n, p in network.named_parameters() if p.requires_grad}, recipe, folder)
    training.resume()
    if training.done < recipe.samples:
        with lessons() as loss_of:
            training.run(loss_of, after_save=lambda: after_save(training))
    swap(training.parameters, training.average)
    return network.requires_grad_(False).eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """For first weights that torch draws; what comes after draws as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        yield


@contextmanager
def want_of_memory_told(remedy: str) -> Iterator[None]:
    """Where memory runs out, `out_of_memory` with what to do about it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).partition("\n")[0] or "Memory ran out."
        raise UsoflowError("out_of_memory", what, remedy=remedy) from None


@torch.no_grad()
def swap(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `values` into the parameters and return what was in them: to look at averaged weights."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
    return before


def load_average(folder: Path, parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> None:
    """Put the averaged weights of a finished stage into parameters of the same names.

    Raises:
        UsoflowError: "training_config" if the stage was not run, or not to the recipe's end.
    """
    if not (folder / "state.pt").exists():
        raise stage_missing(folder.name, folder.parent)
    with read_state(folder / "state.pt") as state:
        done, average = state["done"], state["average"]
        if done < recipe.samples:
            raise stage_missing(folder.name, folder.parent, f"is at {done} of {recipe.samples} samples")
        swap(parameters, average)


def stage_missing(name: str, folder: Path, reason: str = "was not run") -> UsoflowError:
    """The error of a stage that needs another one."""
    return UsoflowError(
        "training_config", f"The stage {name} {reason} in {folder}.",
        remedy=f"Run `usoflow train {name} --work {folder}` first, or `all`.",
    )  # fmt: skip

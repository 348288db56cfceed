"""Times of several ways to do one thing, taken in turn: a drift of the machine's speed hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each way, in the order of the rounds; warm-ups are not among them."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Of one way."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, peer: str) -> float:
        """How many times faster than the peer: the median over the rounds of the ratio within a round."""
        pairs = zip(self.seconds[peer], self.seconds[name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Run every way once to warm up, then all of them in turn, `rounds` times."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for way in ways.values():
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                found[name].append(seconds(way))
    return Times({name: tuple(times) for name, times in found.items()})


Group = tuple[Mapping[str, Callable[[], object]], Callable[[], AbstractContextManager[object]]]


def groups_in_turn(groups: Sequence[Group], rounds: int) -> Times:
    """Groups of ways in turn, each within what holds for a group; its first way also runs before, unmeasured.

    So a way is measured as what follows of many of its kind, and a group does not pay for the one before.
    """
    found: dict[str, list[float]] = {name: [] for ways, _ in groups for name in ways}
    with torch.inference_mode():
        for _ in range(rounds):
            for ways, within in groups:
                with within():
                    next(iter(ways.values()))()
                    for name, way in ways.items():
                        found[name].append(seconds(way))
    return Times({name: tuple(times) for name, times in found.items()})


def seconds(way: Callable[[], object]) -> float:
    """How long one call takes, the device's work included."""
    settle()
    start = time.perf_counter()
    way()
    settle()
    return time.perf_counter() - start


def settle() -> None:
    """Wait for what a GPU still does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

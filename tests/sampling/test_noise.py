"""Noise against torch's global generator, whose numbers the reference uses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from golden.compare import Golden
from usoflow.sampling.noise import SEEDS, initial_noise, step_noise


@pytest.mark.parametrize("seed", [0, 42, 1061776533054168, 2**63, SEEDS - 1])
def test_initial_noise_is_that_of_the_global_generator(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = torch.randn(2, 16, 8, 6)
    before = torch.random.get_rng_state()
    assert torch.equal(initial_noise((2, 16, 8, 6), seed), expected)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"


def test_batch_index_gives_each_picture_its_place_in_the_batch() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        drawn = [torch.randn(1, 16, 3, 5) for _ in range(4)]
    noise = initial_noise((3, 16, 3, 5), 7, batch_index=[3, 0, 3])
    assert torch.equal(noise, torch.cat([drawn[3], drawn[0], drawn[3]]))


@pytest.mark.parametrize(("seed", "used"), [(41, 42), (SEEDS - 1, 0)])
def test_step_noise_is_the_stream_of_the_next_seed(seed: int, used: int) -> None:
    draw, like = step_noise(seed), torch.zeros(1, 16, 4, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(used)
        expected = [torch.randn(1, 16, 4, 4) for _ in range(2)]
    assert torch.equal(draw(like), expected[0])
    assert torch.equal(draw(like), expected[1])


def test_goldens(golden: Callable[[str], Golden]) -> None:
    reference = golden("noise")
    for name in reference.names():
        seed, _, shape = name.partition(".")
        sides = tuple(int(side) for side in shape.split("x"))
        report = reference.check(name, initial_noise(sides, int(seed.removeprefix("seed"))).numpy(), 0.0)
        assert report["ok"], report

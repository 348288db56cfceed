"""Schedules against diffusers, closed forms and the reference's values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.compare import Golden
from usoflow.errors import UsoflowError
from usoflow.sampling.schedule import (
    SCHEDULERS,
    FluxSchedule,
    resolution_shift,
    sigmas,
    symmetric_beta_quantile,
)

FLUX = FluxSchedule()


def test_time_shift_equals_diffusers() -> None:
    oracle = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    assert torch.allclose(FLUX.sigma(t), oracle.time_shift(1.15, 1.0, t), atol=1e-12)


def test_simple_on_divisors_of_the_table_equals_diffusers() -> None:
    oracle = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    oracle.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=1.15)
    assert torch.allclose(sigmas("simple", 20, 1.0, schedule=FLUX), oracle.sigmas, atol=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (1024, 768), (1360, 768)])
def test_the_shift_for_a_resolution_equals_diffusers(size: tuple[int, int]) -> None:
    tokens = size[0] * size[1] // 256
    oracle = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    assert resolution_shift(*size, base=0.5, most=1.15) == pytest.approx(oracle)


@pytest.mark.parametrize("shift", [-1e4, -100.0, 79.0, 100.0, 1e4])
def test_levels_of_any_shift_are_numbers(shift: float) -> None:
    """ModelSamplingFlux takes up to 100, at 1024x1024; the formula as it stands overflows."""
    schedule = FluxSchedule(shift)
    for name in SCHEDULERS:
        assert bool(sigmas(name, 8, 1.0, schedule=schedule).isfinite().all()), name
    assert float(schedule.table[-1]) == 1.0
    assert schedule.percent_to_sigma(0.5) == pytest.approx(float(shift > 0), abs=1e-30)


@settings(deadline=None)
@given(st.sampled_from(sorted(SCHEDULERS)), st.integers(1, 60), st.floats(0.02, 1.0))
def test_levels_fall_from_at_most_one_to_zero(name: str, steps: int, denoise: float) -> None:
    levels = sigmas(name, steps, denoise, schedule=FLUX)
    assert levels.dtype == torch.float32
    assert 0 < levels[0] <= 1
    assert levels[-1] == 0
    assert bool((levels[1:] < levels[:-1]).all())


@settings(deadline=None)
@given(st.sampled_from(["simple", "sgm_uniform", "normal", "karras", "exponential"]), st.integers(1, 200))
def test_there_is_one_level_more_than_steps(name: str, steps: int) -> None:
    assert len(sigmas(name, steps, 1.0, schedule=FLUX)) == steps + 1


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_denoise_takes_the_end_of_a_longer_schedule(name: str) -> None:
    whole = sigmas(name, 26, 1.0, schedule=FLUX)
    assert torch.equal(sigmas(name, 8, 0.3, schedule=FLUX), whole[-9:])  # int(8 / 0.3) = 26
    assert torch.equal(sigmas(name, 26, 0.99995, schedule=FLUX), whole)
    assert len(sigmas(name, 8, 0.0, schedule=FLUX)) == 0


@pytest.mark.parametrize("denoise", [1e-9, 5e-324, 0.000_199])
def test_an_endless_schedule_is_refused(denoise: float) -> None:
    """Its last steps would be all that is used of it."""
    with pytest.raises(UsoflowError, match="20 steps at a denoise") as caught:
        sigmas("simple", 20, denoise, schedule=FLUX)
    assert caught.value.code == "prompt_invalid"
    assert "larger denoise" in caught.value.remedy
    assert len(sigmas("simple", 20, 0.0003, schedule=FLUX)) == 21


def test_official_step_cache_boundaries_round_as_the_reference() -> None:
    levels = sigmas("simple", 20, 1.0, schedule=FLUX)
    start, end = (np.float32(FLUX.percent_to_sigma(p)) for p in (0.15, 0.95))
    assert levels[3].item() > start, "step 3 lies one float32 above the start"
    assert levels[19].item() == end, "step 19 lies on the end"


def test_percentages_beyond_the_ends() -> None:
    assert [FLUX.percent_to_sigma(p) for p in (-1.0, 0.0, 1.0, 2.0)] == [1.0, 1.0, 0.0, 0.0]


def test_quantiles_of_the_arcsine_distribution() -> None:
    """Beta(1/2, 1/2) has a closed form: sin^2(pi p / 2)."""
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(symmetric_beta_quantile(p, 0.5), (math.pi * p / 2).sin() ** 2, atol=1e-12)


def test_quantiles_of_the_uniform_and_the_parabolic_distribution() -> None:
    """Beta(1, 1) is uniform; Beta(2, 2) has the distribution function 3 x^2 - 2 x^3."""
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(symmetric_beta_quantile(p, 1.0), p, atol=1e-12)
    x = symmetric_beta_quantile(p, 2.0)
    assert torch.allclose(3 * x**2 - 2 * x**3, p, atol=1e-12)


def test_one_step_of_kl_optimal_starts_from_pure_noise() -> None:
    """Where the reference divides 0 by 0 and gives NaN."""
    assert sigmas("kl_optimal", 1, 1.0, schedule=FLUX).tolist() == [1.0, 0.0]


def test_goldens(golden: Callable[[str], Golden]) -> None:
    arrays = golden("sigmas").z
    for key in arrays.files:
        if key.startswith("percent_to_sigma."):
            assert FLUX.percent_to_sigma(float(key.partition(".")[2])) == pytest.approx(
                float(arrays[key]), abs=1e-15
            )
        elif key == "table":
            assert np.abs(FLUX.table[::100].numpy() - arrays[key]).max() < 1e-7
        elif key == "table_ends":
            assert FLUX.table[[0, -1]].tolist() == pytest.approx(arrays[key].tolist(), abs=1e-7)
        elif key != "kl_optimal.1.euler.1.0":  # NaN, see above
            name, steps, sampler, denoise = key.split(".", 3)
            if sampler != "euler":  # one that usoflow does not have, with levels of its own
                continue
            levels = sigmas(name, int(steps), float(denoise), schedule=FLUX).numpy()
            assert levels.shape == arrays[key].shape, key
            assert np.abs(levels - arrays[key]).max(initial=0) < 1e-6, key

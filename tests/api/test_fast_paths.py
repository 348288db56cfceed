"""Every fast or small way of computing draws the picture that plain fp32 draws."""

from __future__ import annotations

import pytest
from benchmarks.fast_paths import BOUNDS, WAYS, measure

NAMES = [pytest.param(name, marks=pytest.mark.full if way.compiled else ()) for name, way in WAYS.items()]


@pytest.mark.filterwarnings("ignore")  # of the compiler: as errors they would stop it
@pytest.mark.parametrize("name", NAMES)
def test_pictures_stay_near_those_of_fp32(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Text, subject, style and both; the worst of them."""
    decibels, alike = measure(WAYS[name], seeds=1)
    assert "The compiler failed" not in caplog.text
    least, least_alike = BOUNDS[name]
    assert min(decibels) >= least
    assert min(alike) >= least_alike

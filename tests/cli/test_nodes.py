"""`usoflow nodes`, `usoflow --help`, `python -m usoflow`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shell import usoflow
from usoflow import errors
from usoflow.nodes import registry


def test_every_node_is_listed_once() -> None:
    done = usoflow("nodes")
    assert done.code == 0
    assert sorted(line.split()[0] for line in done.out.splitlines()) == sorted(registry())


@pytest.mark.parametrize("name", registry())
def test_every_node_is_described(name: str) -> None:
    done = usoflow("nodes", name)
    assert done.code == 0
    assert done.out.startswith(f"{name} (")
    schema = registry()[name].schema
    assert schema.description in done.out
    for spec in schema.inputs:
        assert f"  {spec.name}" in done.out


def test_description_of_an_input() -> None:
    text = usoflow("nodes", "KSampler").out
    steps = next(line for line in text.splitlines() if line.split()[:1] == ["steps"])
    assert "INT" in steps
    assert "1 to 10000" in steps
    assert "default 20" in steps
    sampler = next(line for line in text.splitlines() if line.split()[:1] == ["sampler_name"])
    assert "one of euler, " in sampler
    assert "a file of loras/" in usoflow("nodes", "LoraLoaderModelOnly").out
    assert "LATENT (optional)" in usoflow("nodes", "ReferenceLatent").out


def test_unknown_node() -> None:
    done = usoflow("nodes", "Nothing")
    assert done.code == 2
    assert done.err.startswith("error: There is no node Nothing.")


def test_a_node_of_nearly_that_name() -> None:
    assert "Did you mean KSampler?" in usoflow("nodes", "ksampler").err


def test_help_tells_every_exit_code() -> None:
    done = usoflow("--help")
    assert done.code == 0
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes == {2, 3, 4, 5, 6, 130}
    for code in (0, *codes):
        assert f"{code} " in done.out


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "usoflow", "nodes", "Nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no node Nothing.")

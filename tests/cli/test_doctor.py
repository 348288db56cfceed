"""`usoflow doctor`."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from shell import usoflow
from usoflow.cli import doctor


def test_a_machine_with_everything(small_models: Path) -> None:
    done = usoflow("doctor", "--models", small_models)
    assert (done.code, done.err) == (0, "")
    assert torch.__version__ in done.out
    assert f"models: {small_models}" in done.out
    assert "Missing" not in done.out


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = usoflow("doctor", "--models", tmp_path)
    assert "! models" in done.out
    assert "uso-flux1-dit-lora-v1.safetensors" in done.out
    assert "usoflow models pull" in done.out


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(doctor, "PORT", other.getsockname()[1])
        assert "taken" in doctor._port().fact
    assert "free" in doctor._port().fact


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", "bf16 instructions"), ("float32", "--steps 8")])
def test_a_cpu_is_slow_and_why(dtype: str, said: str) -> None:
    finding = doctor._device(torch.device("cpu"), dtype)
    assert said in finding.fact + finding.advice
    assert finding.advice

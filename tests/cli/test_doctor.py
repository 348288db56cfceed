"""`usoflow doctor`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from shell import usoflow
from usoflow.cli import doctor
from usoflow.models import placement


def test_a_machine_with_everything(small_models: Path) -> None:
    done = usoflow("doctor", "--models", small_models)
    assert (done.code, done.err) == (0, "")
    assert torch.__version__ in done.out
    assert f"models: {small_models}" in done.out
    assert "Missing" not in done.out


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are libgomp's on Linux")
@pytest.mark.parametrize(("asked", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_do_not_keep_a_core(small_models: Path, asked: dict[str, str], spins: str) -> None:
    """As the library of torch's threads tells it; what a user has set stays."""
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "usoflow", "doctor", "--models", small_models],
        env=quiet | {"OMP_DISPLAY_ENV": "VERBOSE"} | asked, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = usoflow("doctor", "--models", tmp_path)
    assert "! models" in done.out
    assert "uso-flux1-dit-lora-v1.safetensors" in done.out
    assert "usoflow models pull" in done.out


@pytest.mark.parametrize(("built", "told"), [("12.8", "driver is missing or too old"), (None, "no CUDA")])
def test_a_card_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, built: str | None, told: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert told in doctor._device(torch.device("cpu")).advice


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(doctor, "PORT", other.getsockname()[1])
        assert "taken" in doctor._port().fact
    assert "free" in doctor._port().fact


def test_speed_is_measured() -> None:
    """What is said of a step follows from what is said of the speed, and slowness from that."""
    finding = doctor._speed(torch.device("cpu"), torch.float32)
    tflops, step = (float(number) for number in re.findall(r"[\d.]+(?= TFLOP/s| s or)", finding.fact))
    assert step == pytest.approx(doctor.STEP_TFLOP / tflops, rel=0.5)  # both are rounded
    assert bool(finding.advice) == (step * doctor.STEPS > doctor.PATIENCE)


def test_operations_of_a_step() -> None:
    """The linear layers of 19 double and 38 single blocks, and their attention; see FLUX.1's `model.py`."""
    tokens, hidden = 4352, 3072
    per_token = 12 * hidden**2 * (19 + 38)  # qkv 3, projection 1, MLP 8; linear1 7, linear2 5
    attention = 4 * tokens**2 * hidden * (19 + 38)
    assert (2 * tokens * per_token + attention) / 1e12 == pytest.approx(doctor.STEP_TFLOP, rel=0.02)


def test_a_container_and_what_it_uses_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file, text in {
        "max": "4000000000",
        "current": "3000000000",
        "stat": "active_file 1000000000",
    }.items():
        (tmp_path / f"memory.{file}").write_text(f"{text}\n")
    monkeypatch.setattr(placement, "CONTAINER", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32e9, available=31e9))
    (finding,) = doctor._memory()
    assert finding.fact == "4 GB, 2 GB free"
    assert "read again at each step" in finding.advice


@pytest.mark.parametrize(("free", "advised"), [(19e9, True), (21e9, False)])
def test_memory_in_which_the_transformer_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, advised: bool
) -> None:
    monkeypatch.setattr(placement, "CONTAINER", tmp_path / "none")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32e9, available=free))
    (finding,) = doctor._memory()
    assert finding.fact == f"32 GB, {free / 1e9:.0f} GB free"
    assert bool(finding.advice) == advised


def test_matrix_units_of_this_cpu() -> None:
    units = list(doctor._matrix_units(torch.device("cpu")))
    assert torch.backends.cpu.get_cpu_capability() in units[0]
    flags = Path("/proc/cpuinfo").read_text()
    assert ("AMX tiles (bf16, int8)" in units) == ("amx_tile" in flags)
    assert ("AVX-512 bf16" in units) == ("avx512_bf16" in flags)


def test_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"ui": ("no_such_module", "the editor")})
    (finding,) = doctor._extras()
    assert finding.advice == 'pip install "usoflow[ui]"'

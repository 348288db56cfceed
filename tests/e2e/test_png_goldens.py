"""The official example prompts, from the shell, against the pictures that ComfyUI made of them.

256x256, 4 steps, on the synthetic fp8 checkpoint; `USO` LoRA, references, styles and EasyCache as they come.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.full, pytest.mark.shared]

FP32_PSNR = 45.0  # dB
BF16_PSNR = 45.0  # dB; measured 54.1, see docs/numerics.md
AUTO_PSNR = 45.0  # dB; measured 47.9 where the CPU multiplies int8


def psnr(one: Path, other: Path) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, in dB."""
    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) for path in (one, other))
    error = float(((a - b) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def run(prompt: Path, models: Path, output: Path, dtype: str) -> Path:
    """`usoflow run` in a process of its own; the picture it names."""
    command = [sys.executable, "-m", "usoflow", "run", prompt, "--json", "--device", "cpu", "--dtype", dtype]
    folders = ["--models", models, "--input", models.parent / "input", "--output", output]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=True)
    (picture,) = json.loads(done.stdout)["images"]
    return Path(picture)


@pytest.mark.parametrize(("dtype", "least"), [("fp32", FP32_PSNR), ("bf16", BF16_PSNR), ("auto", AUTO_PSNR)])
@pytest.mark.parametrize("example", ["ex1", "ex2", "ex3"])
def test_example(
    example: str, dtype: str, least: float, shared: Path, synth_models: Path, tmp_path: Path
) -> None:
    goldens = shared / "goldens" / "png"
    picture = run(goldens / f"{example}.prompt.json", synth_models, tmp_path, dtype)
    found = psnr(picture, goldens / f"{example}.png")
    print(f"{example} {dtype}: {found:.1f} dB")
    assert found >= least

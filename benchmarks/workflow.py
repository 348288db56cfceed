"""The official workflow, warm, beside diffusers doing the same steps in fp32: step by step in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import peer, step, synthetic
from benchmarks.report import Table
from benchmarks.timing import seconds
from usoflow.api.engine import Engine
from usoflow.execution.progress import Event, NodeProgress
from usoflow.models import int8

T5_LENGTH = 256  # tokens of a short prompt, padded as for FLUX in ComfyUI
CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"  # the name that the official workflow asks for


def table(scratch: Path | None, *, quick: bool) -> Table:
    """Both references; what a new seed leaves known is known to both."""
    side, subject, steps = (64, 64, 2) if quick else (512, 512, 20)
    files = {CHECKPOINT: synthetic.checkpoint(synthetic.SHALLOW, "F8_E4M3", t5_layers=1)}
    case = step.Case("both", (side, side), (subject,), style=True, text=T5_LENGTH)
    with synthetic.written({**files, **synthetic.uso_files(synthetic.SHALLOW)}, scratch) as models:
        peer_step, peer_decode = _peer(models / CHECKPOINT, case)
        with (
            tempfile.TemporaryDirectory() as folder,
            Engine(models=models, output=folder, device="cpu") as engine,
        ):
            picture = Image.effect_noise((subject, subject), 64).convert("RGB")

            def generate(seed: int, count: int, progress: Callable[[Event], None]) -> None:
                engine.generate(
                    "a cat", subject=picture, style=picture, size=(side, side), steps=count,
                    subject_size=subject, seed=seed, progress=progress,
                )  # fmt: skip

            generate(0, 1, InTurn(peer_step))  # loads, encodes and decodes
            peer_decode()  # as ours has
            turns = InTurn(peer_step)
            generate(1, steps, turns)
            whole, theirs = turns.whole(), sum(turns.theirs) + seconds(peer_decode)
    stored = "stored in fp8 and multiplied in int8" if int8.multiplied_here() else "stored in fp8"
    pairs = [b / a for a, b in zip(turns.ours[1:], turns.theirs[1:], strict=True)]  # the first prepares
    return Table(
        "The official workflow, warm",
        f"{side}x{side}, {steps} steps, subject {subject} and style, full width, 1 double and 1 single block,"
        f" {stored}. Ours is a whole `generate` with a new seed and USO's LoRA, file written; after each of"
        " its steps diffusers does one of its own on as many tokens (without LoRA), at the end its VAE"
        " decodes."
        " What a new seed leaves known (prompt and pictures encoded) is known to both.",
        ["", "usoflow, default", "diffusers fp32", "faster"],
        [
            ["a step, s (median)", f"{median(turns.ours):.2f}", f"{median(turns.theirs):.2f}",
             f"{median(pairs):.2f}x"],
            ["the picture, s", f"{whole:.1f}", f"{theirs:.1f}", f"{theirs / whole:.2f}x"],
        ],
        raw={"ours": turns.ours, "theirs": turns.theirs, "whole": [whole, theirs]},
    )  # fmt: skip


class InTurn:
    """Hears of each step of a run, and lets the peer do one before the next begins."""

    def __init__(self, peer_step: Callable[[], Tensor]) -> None:
        self._peer_step = peer_step
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._begun = self._since = time.perf_counter()

    def __call__(self, event: Event) -> None:
        if not isinstance(event, NodeProgress):
            return
        self.ours.append(time.perf_counter() - self._since)
        with torch.inference_mode():
            self.theirs.append(seconds(self._peer_step))
        self._since = time.perf_counter()

    def whole(self) -> float:
        """Seconds since the beginning that were not the peer's."""
        return time.perf_counter() - self._begun - sum(self.theirs)


def _peer(path: Path, case: step.Case) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """A step of diffusers' transformer, and its VAE's decoding (random weights)."""
    from diffusers import AutoencoderKL

    flux = step.load(path, "fp32")
    given = step.inputs_of(case, flux, torch.device("cpu"))
    one = step.theirs(peer.twin(flux), given)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip

    def decode() -> object:
        with torch.inference_mode():
            return vae.decode(given.latent)

    return one, decode

"""The official workflow, warm, beside diffusers doing the same steps in fp32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import peer, step, synthetic
from benchmarks.report import Table
from benchmarks.timing import in_turn
from usoflow.api.engine import Engine

CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"  # the name that the official workflow asks for


def table(scratch: Path | None, rounds: int, *, quick: bool) -> Table:
    """Both references; what a new seed leaves known is known to both."""
    side, subject, steps = (64, 64, 2) if quick else (512, 512, 20)
    files = {CHECKPOINT: synthetic.checkpoint(synthetic.SHALLOW, "BF16", t5_layers=1)}
    with synthetic.written(files | synthetic.uso_files(synthetic.SHALLOW), scratch) as models:
        case = step.Case("both", (side, side), (subject,), style=True)
        theirs = _peer(models / CHECKPOINT, case, steps)
        with tempfile.TemporaryDirectory() as folder, Engine(models=models, output=folder) as engine:
            picture = Image.effect_noise((subject, subject), 64).convert("RGB")
            seeds = iter(range(1000))

            def ours() -> None:
                engine.generate(
                    "a cat", subject=picture, style=picture, size=(side, side), steps=steps,
                    subject_size=subject, seed=next(seeds),
                )  # fmt: skip

            times = in_turn({"usoflow, default": ours, "diffusers fp32": theirs}, rounds)
    speedup = times.speedup("usoflow, default", "diffusers fp32")
    return Table(
        "The official workflow, warm",
        f"{side}x{side}, {steps} steps, subject {subject} and style, USO LoRA (ours), full width,"
        f" 1 double and 2 single blocks; seconds, medians of {rounds} in turn. Ours is a whole `generate`"
        " with a new seed, file written. diffusers: as many steps of its transformer on the same tokens, its"
        " VAE's decoding (random weights), prompt and pictures encoded before.",
        ["", "seconds", "faster"],
        [
            ["usoflow, default", f"{times.median('usoflow, default'):.2f}", f"{speedup:.2f}x"],
            ["diffusers fp32", f"{times.median('diffusers fp32'):.2f}", ""],
        ],
        raw=dict(times.seconds),
    )


def _peer(path: Path, case: step.Case, steps: int) -> Any:
    from diffusers import AutoencoderKL

    flux = step.load(path, "fp32")
    given = step.inputs_of(case, flux, torch.device("cpu"))
    one = step.theirs(peer.twin(flux), given)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip

    def whole() -> None:
        for _ in range(steps):
            one()
        vae.decode(given.latent)

    return whole

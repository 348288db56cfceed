"""What every fast or small way of computing does to a picture: pocket models, fixed seeds, against fp32.

`tests/api/test_fast_paths.py` holds each to `BOUNDS`.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import TypeVar
from unittest.mock import patch

import torch
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from benchmarks.quality import psnr, ssim
from benchmarks.report import Table
from usoflow.api.engine import Engine
from usoflow.api.workflow import Workflow
from usoflow.models import int8, kernels, placement, residence
from usoflow.models.placement import Placement
from usoflow.settings import POCKET_MODELS

M = TypeVar("M", bound=nn.Module)

HERE = Path("examples")
CHECKPOINT = "checkpoints/usoflow-pocket.safetensors"
BLOCKS = ("model.diffusion_model.double_blocks.", "model.diffusion_model.single_blocks.")
EQUAL = 99.0  # dB that stand for no difference at all
SUBJECT, STYLE = HERE / "robot.png", HERE / "pixels.png"


@dataclass(frozen=True, slots=True)
class Way:
    """How pictures are made.

    Attributes:
        dtype: of the transformer.
        vram: the budget, if any.
        fp8: the matrices of the blocks are stored in fp8.
        compiled: blocks are compiled, which needs a run before.
        within: what else holds meanwhile.
    """

    dtype: str
    vram: str | None = None
    fp8: bool = False
    compiled: bool = False
    within: Callable[[], AbstractContextManager[object]] = nullcontext


def _torch_alone() -> AbstractContextManager[object]:
    """Without oneDNN's products and attention by heads."""
    return patch.object(kernels, "_multiplied", frozenset)


def _bf16_is_best() -> AbstractContextManager[object]:
    """As on a CPU that multiplies bf16."""
    return patch.object(placement, "_best_dtype", lambda _: torch.bfloat16)


@contextmanager
def _products_in_int8() -> Iterator[None]:
    """As on a CPU that is fast at it, with models of any size."""
    with (
        _bf16_is_best(),
        patch.object(int8, "multiplied_here", lambda: True),
        patch.object(int8, "LEAST_SIDE", 1),
    ):
        yield


@contextmanager
def _products_in_fp8() -> Iterator[None]:
    """As on a GPU that multiplies fp8; torch computes that on a CPU too, slowly."""
    settle = Placement.settle

    def settled(
        self: Placement, module: M, blocks: Sequence[nn.Module] = (), *, as_stored: bool = False
    ) -> M:
        settle(self, module, blocks, as_stored=bool(blocks) or as_stored)
        residence.multiply_in_fp8(blocks, self.device)
        return module

    with patch.object(Placement, "settle", settled):
        yield


REFERENCE = Way("fp32", within=_torch_alone)
WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "fp32": Way("fp32"),
        "fp32, weights passing through 1 MB": Way("fp32", vram="1MB"),
        "bf16": Way("bf16"),
        "bf16, weights passing through 1 MB": Way("bf16", vram="1MB"),
        "bf16, T5 and VAE too": Way("auto", within=_bf16_is_best),
        "bf16, compiled": Way("bf16", compiled=True),
        "fp32, blocks rounded to fp8": Way("fp32", fp8=True),
        "bf16, blocks stored in fp8": Way("bf16", fp8=True),
        "bf16, T5 and VAE too, blocks stored in fp8, multiplied in int8": Way(
            "auto", fp8=True, within=_products_in_int8
        ),
        "bf16, blocks stored and multiplied in fp8": Way("bf16", fp8=True, within=_products_in_fp8),
    }
)
BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(  # of the worst picture: PSNR in dB, SSIM
    {
        "fp32": (80.0, 0.9999),
        "fp32, weights passing through 1 MB": (80.0, 0.9999),
        "bf16": (46.0, 0.995),
        "bf16, weights passing through 1 MB": (46.0, 0.995),
        "bf16, T5 and VAE too": (44.0, 0.995),
        "bf16, compiled": (46.0, 0.995),
        "fp32, blocks rounded to fp8": (28.0, 0.965),
        "bf16, blocks stored in fp8": (45.0, 0.995),
        "bf16, T5 and VAE too, blocks stored in fp8, multiplied in int8": (38.0, 0.99),
        "bf16, blocks stored and multiplied in fp8": (38.0, 0.99),
    }
)


def table(seeds: int) -> Table:
    """PSNR and SSIM of each way."""
    found = {name: measure(way, seeds) for name, way in WAYS.items()}
    return Table(
        "Pictures of the fast paths",
        f"The four official graphs with the pocket models on {seeds} seeds each, 20 steps; against fp32 with"
        " torch's own products, of the same weights: what rounding those to fp8 does has a row of its own."
        " Mean and worst of the pictures; 99 dB is no difference.",
        ["", "PSNR dB", "worst", "SSIM", "worst"],
        [
            [name, f"{mean(db):.1f}", f"{min(db):.1f}", f"{mean(alike):.4f}", f"{min(alike):.4f}"]
            for name, (db, alike) in found.items()
        ],
        raw=found,
    )


def measure(way: Way, seeds: int) -> tuple[list[float], list[float]]:
    """PSNR and SSIM of every picture; the reference has the same weights, but where these are what is new."""
    expected = reference(seeds, fp8=way.fp8 and way.dtype != REFERENCE.dtype)
    pairs = list(zip(pictures(way, seeds), expected, strict=True))
    return [min(psnr(a, b), EQUAL) for a, b in pairs], [ssim(a, b) for a, b in pairs]


@functools.cache
def reference(seeds: int, *, fp8: bool) -> list[Image]:
    """What is compared with."""
    return pictures(replace(REFERENCE, fp8=fp8), seeds)


def pictures(way: Way, seeds: int) -> list[Image]:
    """By the four graphs, on seeds 0 to `seeds`."""
    with (
        way.within(),
        _models(fp8=way.fp8) as models,
        tempfile.TemporaryDirectory() as output,
        Engine(
            models=models, output=output, device="cpu", dtype=way.dtype, vram=way.vram, compiled=way.compiled
        ) as engine,
    ):
        for graph in graphs() if way.compiled else ():
            engine.run(graph.with_seed(seeds))
        made = (engine.run(graph.with_seed(seed)) for graph in graphs() for seed in range(seeds))
        return [result.images[0] for result in made]


def graphs() -> list[Workflow]:
    """Text, subject, style, both: the official graphs, with the pictures of the examples."""
    given: Mapping[str, Mapping[str, Path]] = {
        "text": {},
        "subject": {"47": SUBJECT},
        "style": {"88": STYLE, "91": STYLE},
        "both": {"47": SUBJECT, "112:46": STYLE, "112:53": STYLE},
    }
    found = []
    for name, files in given.items():
        graph = Workflow.load(HERE / "pocket" / f"{name}.json")
        for node, file in files.items():
            graph = graph.with_picture(node, file)
        found.append(graph.assign("CLIPTextEncode.text=a robot in a forest"))
    return found


@contextmanager
def _models(*, fp8: bool) -> Iterator[Path]:
    """The pocket models, on request with the matrices of the transformer's blocks in fp8."""
    if not fp8:
        yield POCKET_MODELS
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        shutil.copytree(POCKET_MODELS, models)
        with safe_open(POCKET_MODELS / CHECKPOINT, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            declared = reader.metadata()
        narrow = {
            name: value.to(torch.float8_e4m3fn)
            for name, value in tensors.items()
            if name.startswith(BLOCKS) and value.ndim == 2
        }
        save_file(tensors | narrow, models / CHECKPOINT, metadata=declared)
        yield models

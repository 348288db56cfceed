"""On a GPU, what its stand-in cannot show: devices, streams, pinned memory, its products and its compiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from networks import lora_of, relative, transformer_of, velocity
from usoflow.api.engine import Engine
from usoflow.models import kernels
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.placement import Placement

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.filterwarnings("default"),  # the compiler's own
]
BF16 = torch.bfloat16


def loaded(
    models: Path,
    device: str,
    weight_dtype: str = "default",
    *,
    dtype: str = "bf16",
    lora: bool = False,
    budget: int | None = None,
) -> Flux:
    """The small transformer, as the library holds it."""
    library = ModelLibrary(Placement.choose(device, dtype, budget, compiled=False))
    uses = (LoraUse(lora_of(models), 1.0),) if lora else ()
    with torch.inference_mode():
        return library.flux(transformer_of(models), uses, weight_dtype)


@pytest.mark.parametrize("lora", [False, True])
def test_a_gpu_computes_what_a_cpu_does(small_models: Path, lora: bool) -> None:
    """In fp32 weights are as the file has them; in bf16 a CPU rounds these, whose numbers are fp16."""
    expected = velocity(loaded(small_models, "cpu", dtype="fp32", lora=lora), torch.float32)
    flux = loaded(small_models, "cuda", lora=lora)
    assert relative(velocity(flux, torch.float32, device="cuda"), expected) < 1e-4
    assert relative(velocity(flux, BF16, device="cuda"), expected) < 3e-2


def test_blocks_that_pass_through_compute_the_same(small_models: Path) -> None:
    """Again and again: a copy that came too early or too late would show."""
    expected = velocity(loaded(small_models, "cuda"), BF16, device="cuda")
    passing = loaded(small_models, "cuda", budget=1)
    for _ in range(20):
        assert torch.equal(velocity(passing, BF16, device="cuda"), expected)


def test_products_in_fp8_are_as_near_as_their_rounding(small_models: Path) -> None:
    expected = velocity(loaded(small_models, "cpu"), torch.float32)
    found = velocity(loaded(small_models, "cuda", "fp8_e4m3fn", dtype="auto"), BF16, device="cuda")
    assert relative(found, expected) < 0.1


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
def test_compiled_blocks_compute_the_same(small_models: Path, weight_dtype: str) -> None:
    library = ModelLibrary(Placement.choose("cuda"))
    with torch.inference_mode():
        flux = library.flux(transformer_of(small_models), (), weight_dtype)
        library.begin_run()
        expected = velocity(flux, BF16, device="cuda")
        library.begin_run()
        found = velocity(flux, BF16, device="cuda")
    assert not library._regions._failed
    assert relative(found, expected) < (2e-2 if weight_dtype == "default" else 5e-2)


@pytest.mark.parametrize("stored", [BF16, torch.float8_e4m3fn])
@torch.inference_mode()
def test_few_rows_are_summed_by_the_compiler(stored: torch.dtype) -> None:
    x, bias = torch.randn(2, 256, device="cuda").to(BF16), torch.randn(96, device="cuda").to(BF16)
    weight = torch.randn(96, 256, device="cuda").to(stored)
    compiled = torch.compile(lambda: kernels.linear(x, weight.to(BF16), bias), fullgraph=True)
    expected = x.double() @ weight.double().t() + bias.double()
    assert relative(compiled(), expected) < 1e-2


def test_the_whole_workflow(small_models: Path, tmp_path: Path) -> None:
    """With all that passes between its nodes: a subject, two styles, a prompt."""
    pictures = small_models.parent / "input"
    options = {"size": (64, 64), "steps": 2, "seed": 3, "subject_size": 32}
    made = {}
    for device in ("cpu", "cuda"):
        with Engine(models=small_models, output=tmp_path, device=device, dtype="fp32") as engine:
            result = engine.generate(
                "a cat", subject=pictures / "subject.png", style=[pictures / "style.png"] * 2, **options
            )
            made[device] = torch.from_numpy(np.asarray(result.images[0]).astype(np.float32))
    assert (made["cuda"] - made["cpu"]).abs().mean() < 1.0

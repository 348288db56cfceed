"""Products in fp8: within what 3 bits of mantissa round, exact branches, nothing but the blocks' matrices.

A CPU computes them too, so that all but the speed is tested here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks import lora_of, relative, require_exact_branches, transformer_of, velocity
from usoflow.models import fp8
from usoflow.models.flux import Modulation
from usoflow.models.library import ModelLibrary
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.placement import Placement
from usoflow.models.residence import multiply_in_fp8
from usoflow.models.weights import Linear

CPU = torch.device("cpu")
# Half of the last of 3 bits of mantissa is 2^-4 of a number at most; root mean square that makes 2.6%.
ROUNDED = 0.035


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rows_are_rounded_to_three_bits_each_by_its_own_scale(size: float) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None] * size).bfloat16()
    narrow, scales = fp8.rounded(rows)
    assert (narrow.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (64, 1))
    back = narrow.float() * scales
    assert all(0.005 < relative(one, other) < ROUNDED for one, other in zip(back, rows, strict=True))
    assert (narrow.float().abs().amax(-1) == fp8.LARGEST).all()


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    rows = torch.zeros(2, 16, dtype=torch.bfloat16)
    rows[1, 3] = torch.inf
    narrow, scales = fp8.rounded(rows)
    back = narrow.float() * scales
    assert (back[0] == 0).all()
    assert not back[1].isfinite().all()


@pytest.mark.parametrize("scale", [None, torch.tensor(0.25), torch.rand(48), torch.rand(48, 1)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_product_is_as_near_as_its_rounding(scale: Tensor | None, bias: bool) -> None:
    torch.manual_seed(0)
    x, stored = torch.randn(2, 7, 128).bfloat16(), torch.randn(48, 128).to(fp8.STORED)
    added = torch.randn(48).bfloat16() if bias else None
    found = fp8.product(x, stored, fp8.row_scales(scale, 48), added)
    expected = x.double() @ (stored.double() * (1 if scale is None else scale.reshape(-1, 1))).T
    expected = expected if added is None else expected + added.double()
    assert (found.dtype, found.shape) == (torch.bfloat16, (2, 7, 48))
    assert 1e-3 < relative(found, expected) < ROUNDED


@torch.inference_mode()
def test_low_rank_branches_take_what_was_not_rounded() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 32)
    layer.weight = nn.Parameter(torch.randn(32, 64).to(fp8.STORED), requires_grad=False)
    layer.bias.zero_()
    layer.multiply_in_fp8(CPU)
    require_exact_branches(layer)


def test_a_weight_that_does_not_allow_it_is_widened() -> None:
    odd, plain, gguf = Linear(64, 24), Linear(64, 32), Linear(64, 32)
    odd.weight = nn.Parameter(torch.randn(24, 64).to(fp8.STORED), requires_grad=False)
    gguf.weight, gguf.quantised = nn.Parameter(torch.zeros(32, 64).to(fp8.STORED), False), "Q8_0"
    for layer in (odd, plain, gguf):
        layer.multiply_in_fp8(CPU)
        assert layer.row_scales is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_only_bf16_is_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(torch.randn(32, 64).to(fp8.STORED), requires_grad=False)
    x = torch.randn(5, 64).to(dtype)
    before = layer(x)
    layer.multiply_in_fp8(CPU)
    assert torch.equal(layer(x), before)


def test_gradients_are_those_of_the_widened_weight() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(torch.randn(32, 64).to(fp8.STORED), requires_grad=False)
    layer.multiply_in_fp8(CPU)
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert relative(x.grad, layer.weight.double().sum(0).expand(5, 64)) < 1e-2


def test_a_cpu_could_multiply_but_widens() -> None:
    assert fp8.works_on(CPU)
    assert not fp8.multiplied_on(CPU)


def test_where_the_product_is_not_there_weights_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Rowwise scaling is not supported here")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert not fp8.works_on(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_multiplies() -> None:
    device = torch.device("cuda")
    capable = torch.cuda.get_device_capability(device) >= fp8.CAPABILITY
    assert fp8.multiplied_on(device) == capable


def test_a_transformer_in_fp8_is_near_the_exact_one(small_models: Path) -> None:
    """Stored in fp8, with a LoRA: against the same numbers computed in fp32."""
    file, lora = transformer_of(small_models), lora_of(small_models)
    library = ModelLibrary(Placement(CPU, torch.bfloat16))
    with torch.inference_mode():
        base = library.flux(file, (), "fp8_e4m3fn")
    exact, widened = velocity(base, torch.float32), velocity(base, torch.bfloat16)
    multiply_in_fp8(base.blocks, CPU)
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, Linear)}
    modulation = {
        layer for part in base.modules() if isinstance(part, Modulation) for layer in part.modules()
    }
    for name, layer in layers.items():
        in_fp8 = name.startswith(("double_blocks", "single_blocks")) and layer not in modulation
        assert (layer.row_scales is not None) == in_fp8, name
    rounding, found = relative(widened, exact), relative(velocity(base, torch.bfloat16), exact)
    assert rounding < found < 0.06
    with torch.inference_mode():
        view = library.flux(file, (LoraUse(lora, 1.0),), "fp8_e4m3fn")
    assert 0 < relative(velocity(view, torch.bfloat16), velocity(view, torch.float32)) < 0.06

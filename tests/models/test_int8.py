"""Products in int8: within what whole numbers round, exact branches, nothing but the blocks' large matrices.

Every CPU computes them, so that all but the speed is tested anywhere.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import lora_of, relative, require_exact_branches, transformer_of, velocity
from usoflow.models import int8
from usoflow.models.flux import Modulation
from usoflow.models.kernels import Scratch
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_flux
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.placement import Placement
from usoflow.models.residence import Sizes, settle_on_cpu
from usoflow.models.weights import Linear

CPU = torch.device("cpu")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
# Whole numbers up to 126, of normal numbers whose largest is four deviations: half a unit is a 64th of one,
# root mean square that makes 0.9%; the weight's rounding comes to it.
ROUNDED = 0.02


def layer_of(weight: Tensor, scratch: Scratch | None = None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias.requires_grad_(False).zero_()
    layer.multiply_in_int8(scratch or Scratch())
    return layer


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that is fast at it, with weights of any size."""
    monkeypatch.setattr(int8, "multiplied_here", lambda: True)
    monkeypatch.setattr(int8, "LEAST_SIDE", 1)


@given(st.binary(min_size=24, max_size=24))
def test_what_three_bits_hold_stays_in_the_upper_octaves(numbers: bytes) -> None:
    """Any bytes: a row's unit is 1/128 of the power of two above its largest; none is off by half of it."""
    weight = torch.frombuffer(bytearray(numbers), dtype=torch.uint8).view(int8.STORED).view(3, 8)
    with torch.inference_mode():
        whole, scale = int8.narrowed(weight, None, Scratch())
    for row, found, unit in zip(weight.double(), whole.double(), scale.double(), strict=True):
        if row.isnan().any():
            assert unit.isnan()
            continue
        largest = row.abs().max()
        assert largest == 0 or largest / unit <= 120
        assert largest == 0 or largest / unit >= 64
        assert ((found * unit - row).abs() <= unit / 2).all()
        exact = row.abs() >= 8 * unit
        assert (found * unit)[exact].equal(row[exact])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rows_are_rounded_each_by_its_own_scale(size: float) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None] * size).bfloat16()
    whole, factors = int8.rounded(rows)
    assert (whole.dtype, factors.dtype, factors.shape) == (torch.int8, torch.bfloat16, (64, 1))
    back = whole.double() * factors.double()
    assert all(0.001 < relative(one, other) < ROUNDED for one, other in zip(back, rows, strict=True))
    assert (whole.int().abs().amax(-1) == int8.LARGEST).all()


def test_no_row_exceeds_seven_bits() -> None:
    """Whatever the rounding of its factor and quotients: every number that can be a row's largest."""
    largest = torch.arange(1 << 7, dtype=torch.int16).add(0x3F80).view(torch.bfloat16)  # 1 to 2
    whole, _ = int8.rounded(torch.stack([largest, -largest], dim=-1))
    assert (whole == torch.tensor([int8.LARGEST, -int8.LARGEST])).all()


@pytest.mark.parametrize("scale", [None, torch.tensor(0.25), torch.rand(48), torch.rand(48, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [7, int8.ROWS + 3])
@torch.inference_mode()
def test_a_product_is_as_near_as_its_rounding(scale: Tensor | None, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    x, stored = torch.randn(2, rows, 128).bfloat16(), torch.randn(48, 128).to(int8.STORED)
    added = torch.randn(48).bfloat16() if bias else None
    found = int8.product(x, *int8.narrowed(stored, scale, Scratch()), added, Scratch())
    expected = x.double() @ (stored.double() * (1 if scale is None else scale.reshape(-1, 1))).T
    expected = expected if added is None else expected + added.double()
    assert (found.dtype, found.shape) == (torch.bfloat16, (2, rows, 48))
    assert 1e-3 < relative(found, expected) < ROUNDED


@torch.inference_mode()
def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    x = torch.zeros(3, 16, dtype=torch.bfloat16)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    weight, scale = int8.narrowed(torch.ones(8, 16).to(int8.STORED), None, Scratch())
    found = int8.product(x, weight, scale, None, Scratch())
    assert (found[0] == 0).all()
    assert not found[1:].isfinite().any()


@torch.inference_mode()
def test_low_rank_branches_take_what_was_not_rounded(everywhere: None) -> None:
    torch.manual_seed(0)
    require_exact_branches(layer_of(torch.randn(32, 64).to(int8.STORED)))


def test_a_weight_that_does_not_allow_it_or_is_small_is_widened() -> None:
    side = int8.LEAST_SIDE
    fitting = torch.zeros(side, side).to(int8.STORED)
    assert layer_of(fitting).in_int8
    assert not layer_of(fitting[1:]).in_int8
    assert not layer_of(fitting.float()).in_int8
    layer = Linear(side, side)
    layer.weight, layer.quantised = nn.Parameter(fitting, False), "Q8_0"
    layer.multiply_in_int8(Scratch())
    assert not layer.in_int8


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_only_bf16_is_rounded(everywhere: None, dtype: torch.dtype, held: bool) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(torch.randn(32, 64).to(int8.STORED)), torch.randn(5, 64).to(dtype)
    expected = x.double() @ layer.weight.double().T
    if held:
        layer.hold_in_int8()
    assert relative(layer(x), expected) < (1e-2 if held else 1e-3)  # the weight's whole numbers, no more


def test_gradients_are_those_of_the_widened_weight(everywhere: None) -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(32, 64).to(int8.STORED))
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert relative(x.grad, layer.weight.double().sum(0).expand(5, 64)) < 1e-2


def test_it_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8.works()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("_int_mm is not supported here")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert not int8.works()


@torch.inference_mode()
def test_every_plan_gives_the_same_numbers(everywhere: None, small_models: Path) -> None:
    """Narrowed once, or at each use."""
    found = {}
    for budget, as_stored in ((10**9, False), (10**9, True), (1, False)):
        flux = load_flux(transformer_of(small_models))
        for layer in flux.modules():
            if isinstance(layer, Linear):
                layer.weight = nn.Parameter(layer.weight.to(int8.STORED), requires_grad=False)
        wide = Sizes.of(flux, flux.blocks, torch.bfloat16).ready
        plan = settle_on_cpu(flux, flux.blocks, torch.bfloat16, budget, as_stored=as_stored, eight_bits=True)
        found[plan] = velocity(flux, torch.bfloat16)
        layers = [layer for layer in flux.modules() if isinstance(layer, Linear)]
        saved = sum(layer.shape[0] * layer.shape[1] for layer in layers if layer.in_int8)
        assert Sizes.of(flux, flux.blocks, torch.bfloat16).ready == wide - saved > 0
        whole = sum(layer.weight.dtype == torch.int8 for layer in layers)
        assert (whole == 0) == (plan == "passing")
    assert set(found) == {"ready", "stored", "passing"}
    assert torch.equal(found["ready"], found["stored"])
    assert torch.equal(found["ready"], found["passing"])


def test_a_transformer_in_int8_is_near_the_exact_one(everywhere: None, small_models: Path) -> None:
    """Stored in fp8, with a LoRA: against the same numbers computed in fp32."""
    file, lora = transformer_of(small_models), lora_of(small_models)

    def flux(dtype: torch.dtype, *uses: LoraUse) -> nn.Module:
        with torch.inference_mode():
            return ModelLibrary(Placement(CPU, dtype, fastest=True)).flux(file, uses, "fp8_e4m3fn")

    exact, base = flux(torch.float32), flux(torch.bfloat16)
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, Linear)}
    modulation = {
        layer for part in base.modules() if isinstance(part, Modulation) for layer in part.modules()
    }
    for name, layer in layers.items():
        in_int8 = name.startswith(("double_blocks", "single_blocks")) and layer not in modulation
        assert layer.in_int8 == in_int8, name
    expected = velocity(exact, torch.float32)
    assert 1e-3 < relative(velocity(base, torch.bfloat16), expected) < 0.03
    use = LoraUse(lora, 1.0)
    changed, expected = flux(torch.bfloat16, use), velocity(flux(torch.float32, use), torch.float32)
    assert 1e-3 < relative(velocity(changed, torch.bfloat16), expected) < 0.03


def test_who_asks_for_a_dtype_gets_it() -> None:
    assert Placement.choose("cpu").fastest
    assert Placement.choose("cpu", "bf16").vae_dtype == torch.float32
    assert not Placement.choose("cpu", "bf16").fastest
    assert not Placement.choose("cpu", "fp32").fastest


@torch.inference_mode()
def test_without_eight_bits_fp8_is_widened(everywhere: None, small_models: Path) -> None:
    flux = ModelLibrary(Placement(CPU, torch.bfloat16)).flux(transformer_of(small_models), (), "fp8_e4m3fn")
    assert not any(layer.in_int8 for layer in flux.modules() if isinstance(layer, Linear))


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="this system has no large pages")
@torch.inference_mode()
def test_whole_numbers_lie_in_large_pages() -> None:
    """As the system lists the memory that is to be so."""
    whole, _ = int8.narrowed(torch.zeros(2048, 4096).to(int8.STORED), None, Scratch())
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_bytes().split(b"\n"):
        if bounds := re.match(rb"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(bound, 16) for bound in bounds.groups())
            inside = first <= whole.data_ptr() + whole.nbytes // 2 < last
        elif inside and line.startswith(b"VmFlags:"):
            flags = line.decode()
    assert " hg" in flags

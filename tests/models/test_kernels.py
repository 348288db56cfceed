"""The CPU's own products against torch's: same numbers within rounding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import relative
from usoflow.models import kernels
from usoflow.models.kernels import Scratch, attention, has_nan, linear, pack, widen
from usoflow.models.weights import Linear

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_linear_is_a_product(dtype: torch.dtype, gelu: bool, packed: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 96), torch.randn(160, 96), torch.randn(160)
    expected = F.linear(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    with torch.inference_mode():
        held = pack(weight.to(dtype)) if packed else weight.to(dtype)
        found = linear(x.to(dtype), held, bias.to(dtype), gelu=gelu)
    assert found.dtype == dtype
    assert relative(found, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_onednn_everything_is_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As on processors other than x86."""
    monkeypatch.setattr(kernels, "_multiplied", frozenset)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((2, 300, 64), (64, 64), (64,)))
    q, k, v = (torch.randn(2, 3, 300, 16).to(dtype) for _ in range(3))
    with torch.inference_mode():
        assert pack(weight) is weight
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        assert torch.equal(attention(tokens_first(q.float(), k.float(), v)), expected)


def test_gradients_flow_where_they_are_asked_for() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    linear(x, weight, None).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def tokens_first(*heads_first: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in heads_first)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("length", [5, kernels.FEW_TOKENS, kernels.ROWS + 3])
def test_attention_is_attention(dtype: torch.dtype, length: int) -> None:
    """Below, at and beyond the sizes at which it is done otherwise."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16).to(dtype) for _ in range(3))
    exact = q.float(), k.float()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    with torch.inference_mode():
        found = attention(tokens_first(*exact, v))
    assert found.dtype == dtype
    assert found.shape == (2, length, 48)
    assert relative(found, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("lengths", [(3, 5), (100, kernels.ROWS)])
@torch.inference_mode()
def test_streams_attend_to_each_other(dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    whole = tuple(torch.randn(2, sum(lengths), 3, 16).to(dtype) for _ in range(3))
    streams = zip(*(x.split(lengths, dim=1) for x in whole), strict=True)
    assert torch.equal(attention(*streams), attention(whole))


@pytest.mark.parametrize(("spread", "bound"), [(1.0, 1e-2), (8.0, 5e-2)])
@torch.inference_mode()
def test_scores_that_are_rounded_cost_little(spread: float, bound: float) -> None:
    """FLUX.1's head dim; scores of this deviation."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 128).bfloat16() for _ in range(3))
    q *= spread
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    found = attention(tokens_first(q, k, v))
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < bound


@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_fp8_number_is_widened_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers & 127 != 127].view(torch.float8_e4m3fn)  # without the two NaNs
    with torch.inference_mode():
        assert torch.equal(widen(numbers, dtype), numbers.to(dtype))


def test_fp8_nan_is_found() -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    assert not has_nan(weight)
    weight.view(torch.uint8)[1, 2] = 255
    assert has_nan(weight)


def test_a_product_of_what_does_not_lie_in_order() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(96, 7).t(), torch.randn(96, 160).t()
    with torch.inference_mode():
        assert relative(linear(x, weight, None), x.double() @ weight.double().t()) < BOUNDS[torch.float32]
        rows = torch.randn(3, 2, 200)[..., :96]
        assert relative(linear(rows, weight, None), rows.double() @ weight.double().t()) < 1e-5


def test_weights_are_not_packed_where_gradients_may_be_asked_for() -> None:
    weight = torch.randn(8, 8).bfloat16()
    assert pack(weight) is weight


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_layer_that_was_packed_still_computes_otherwise(dtype: torch.dtype) -> None:
    """With gradients, and in other dtypes than it was packed for."""
    torch.manual_seed(0)
    layer = Linear(64, 32)
    layer.requires_grad_(False)
    layer.weight.normal_()
    layer.bias.zero_()
    weight = layer.weight.bfloat16()
    with torch.inference_mode(False), torch.no_grad():
        layer.weight = nn.Parameter(pack(weight), requires_grad=False)
    x = torch.randn(3, 64).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert relative(y.detach(), x.detach().double() @ weight.double().t()) < BOUNDS[dtype]
    assert relative(x.grad, weight.double().sum(0).expand(3, 64)) < BOUNDS[dtype]
    with torch.no_grad():
        assert relative(layer(x), y.detach()) < BOUNDS[dtype]


def test_scratch_written_in_inference_is_written_after_it() -> None:
    scratch, weight = Scratch(), torch.ones(4, 8).to(torch.float8_e4m3fn)
    with torch.inference_mode():
        widen(weight, torch.float32, scratch)
    with torch.no_grad():
        assert torch.equal(widen(weight, torch.float32, scratch), torch.ones(4, 8))


def test_threads_do_not_share_scratch() -> None:
    scratch = Scratch()
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(scratch.take, torch.Size([8]), torch.float32).result()
    assert theirs.data_ptr() != scratch.take(torch.Size([8]), torch.float32).data_ptr()


def test_scratch_is_used_again() -> None:
    scratch = Scratch()
    large, small = (torch.ones(n, 8).to(torch.float8_e4m3fn) for n in (6, 3))
    with torch.inference_mode():
        first = widen(large, torch.float32, scratch)
        second = widen(small, torch.bfloat16, scratch)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, torch.ones(3, 8, dtype=torch.bfloat16))

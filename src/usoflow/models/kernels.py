"""What a CPU computes faster than torch's defaults: matrix products, attention, fp8 widened.

Called by `weights` and `flux` wherever no gradient is asked for. torch multiplies fp32 matrices with MKL,
which on processors that are not Intel's runs at half of their speed, and so does its attention, in bf16 as
well; oneDNN, which torch brings for bf16 and compiled graphs, does not. torch widens fp8 a value at a time.
On other devices and processors everything here is torch's own.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512  # of queries at once: their scores stay in the cache
FEW_TOKENS = 192  # below, torch's attention is as fast
FEW_ROWS = 4  # of a product, which then takes as long as its weight is read
WIDENED_AT_ONCE = 1 << 19  # values: the intermediate stays in the cache

_X86 = platform.machine().lower() in ("x86_64", "amd64")
_ONEDNN = _X86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_MOVED_TO = (torch.float32, torch.bfloat16)  # what fp8 is widened to by bits

# e4m3 is sign, 4 bits of exponent with bias 7, 3 bits of mantissa. Moved to where the wider format has sign,
# exponent and mantissa, it is too small by the difference of the biases: 127 - 7.
_REBIAS = 2.0**120
# Of e4m3's bits those without the sign: ordered as the numbers are; all of them set are NaN.
MAGNITUDE = 0x7F


@functools.cache
def _multiplied() -> frozenset[torch.dtype]:
    """In which dtypes oneDNN multiplies here: bf16 needs AVX-512."""
    bf16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if bf16 else {torch.float32} if _ONEDNN else ())


def fast(x: Tensor) -> bool:
    """Whether products with x are oneDNN's: on an x86 CPU, in fp32 or bf16, with no gradient asked for."""
    if torch.compiler.is_compiling():  # first: what follows is not to be traced
        return False
    return x.device.type == "cpu" and x.dtype in _multiplied() and not torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """x W^T + b, then GELU (its tanh approximation) on request.

    Args:
        x: [..., in].
        weight: [out, in] in the dtype of x; of `pack` only where `fast(x)`.
        bias: [out] in the dtype of x.
    """
    if fast(x):
        return _product(x, weight, bias, "gelu" if gelu else "none")
    y = _row_by_row(x, weight, bias) if _few(x) else F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def _few(x: Tensor) -> bool:
    """Whether x [rows, in] is for `_row_by_row`: a GPU's compiler is at work, and there are few rows."""
    return torch.compiler.is_compiling() and x.device.type == "cuda" and x.ndim == 2 and len(x) <= FEW_ROWS


def _row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as a sum, with which a compiler joins the widening of W: it is read once, as it is stored."""
    y = (x[:, None].float() * weight.float()).sum(dim=-1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] in the order in which oneDNN multiplies bf16; else `linear` reorders it each time.

    The result takes as many bytes; it has the shape and the dtype of the weight, and all that can be done
    with it else is `to_dense`. Where `fast` will not be, the weight itself: so too where gradients may be
    asked for.
    """
    if weight.dtype != torch.bfloat16 or not fast(weight):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def attention(*streams: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v, where the tokens of all streams attend to each other.

    Args:
        streams: for each q, k and v: [B, L, heads, D], of v's dtype. On a CPU, q and k in fp32 have their
            scores in fp32 too, in which the softmax is computed anyway; others have them in v's dtype.

    Returns:
        [B, sum of L, heads * D] in the dtype of v.
    """
    v = streams[0][2]
    if fast(v) and sum(len(q[0]) for q, _, _ in streams) >= FEW_TOKENS:
        return _attention_by_heads(streams)
    q, k, v = (
        _joined([x.to(v.dtype) for x in parts], 1).transpose(1, 2) for parts in zip(*streams, strict=True)
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _attention_by_heads(streams: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Scores and softmax head by head and some rows at a time: they never leave the cache."""
    qs, ks, vs = zip(*streams, strict=True)
    q, k = (_joined([x.transpose(1, 2) for x in parts], 2).contiguous() for parts in (qs, ks))
    v = _joined([x.permute(0, 2, 3, 1) for x in vs], 3).contiguous()  # [B, heads, D, L]
    batch, heads, length, dim = q.shape
    out = v.new_empty(batch, length, heads, dim)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h], v[b, h]
            if keys.dtype == values.dtype:
                keys, values = pack(keys), pack(values)
            for first in range(0, length, ROWS):
                rows = slice(first, first + ROWS)
                weights = torch.softmax(_product(q[b, h, rows] * dim**-0.5, keys), dim=-1)  # [rows, L]
                out[b, rows, h] = _product(weights.to(v.dtype), values)
    return out.flatten(2)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=dim)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, then, [], "tanh" if then == "gelu" else ""
    )
    return y


class Scratch(threading.local):
    """Memory for what a layer needs for a moment, one after another: as large as the largest of it.

    Each thread has its own.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor that holds until the next one is taken in this thread."""
        size = shape.numel() * dtype.itemsize
        if self._bytes.numel() < size:
            with torch.inference_mode(False):  # else only inference may write it again
                self._bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._bytes[:size].view(dtype).view(shape)


def widen(weight: Tensor, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
    """A weight in the dtype of a computation; as it is, if it is of that dtype.

    Args:
        weight: of any storage dtype and shape.
        dtype: wanted.
        scratch: where on a CPU the result lies; it then holds until the next one. None allocates it.
    """
    if weight.dtype == dtype:
        return weight
    if weight.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return weight.to(dtype)
    out = (
        scratch.take(weight.shape, dtype) if scratch else torch.empty(weight.shape, dtype=dtype, device="cpu")
    )
    if weight.dtype == torch.float8_e4m3fn and dtype in _MOVED_TO and weight.is_contiguous():
        return _widen_e4m3(weight, out)
    return out.copy_(weight)


def has_nan(weight: Tensor) -> bool:
    """Whether an e4m3 weight has NaNs, which `widen` takes for 480: such a weight is for `Tensor.to`."""
    pieces = weight.view(torch.int8).flatten().split(WIDENED_AT_ONCE)
    largest = (int(piece.bitwise_and(MAGNITUDE).amax()) for piece in pieces)  # comparing each is 15x slower
    return MAGNITUDE in largest


def _widen_e4m3(weight: Tensor, out: Tensor) -> Tensor:
    """Bits moved into place, a piece at a time, as torch's vectorised integer operations do it.

    A byte s eeee mmm with its sign extended and shifted left is s s...s eeeemmm 0...0; the copies of the sign
    are masked. Subnormals come right too, since the product with `_REBIAS` is one of numbers.
    """
    wide = torch.int16 if out.dtype == torch.bfloat16 else torch.int32
    shift, copies = (4, 0x7800) if wide == torch.int16 else (20, 0x78000000)
    source, bits, values = weight.view(torch.int8).flatten(), out.view(wide).flatten(), out.flatten()
    for first in range(0, source.numel(), WIDENED_AT_ONCE):
        piece = slice(first, first + WIDENED_AT_ONCE)
        bits[piece].copy_(source[piece]).bitwise_left_shift_(shift).bitwise_and_(~copies)
        values[piece].mul_(_REBIAS)
    return out

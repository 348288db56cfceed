"""Products in int8, where a CPU has them (VNNI): nearly twice as fast as bf16, in half of its memory.

x W^T with each row of x and of W scaled by its own factor to whole numbers of 7 bits, as torchao's "int8
dynamic activation, int8 weight" does it. For weights that are stored in e4m3: scaled by a power of two, their
3 bits of mantissa are whole numbers in the upper four octaves of each row. What they are multiplied with is
rounded at each product: about 1% of relative error where a row's largest number is some deviations, more
where single features stand out (arXiv 2208.07339).
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from usoflow.models.fp8 import STORED, WIDE
from usoflow.models.kernels import MAGNITUDE, Scratch, widen
from usoflow.models.pages import ask_for_large

logger = logging.getLogger(__name__)

BITS = 7  # of a number's size
# To which the largest of a row is scaled. The factor is off by 2^-8 of itself at most, since bf16 has 8 bits,
# and what 127 becomes then may be rounded to 128, which int8 does not have.
LARGEST = 126
LEAST_SIDE = 512  # of a weight; below, rounding takes as long as is won
ROWS = 512  # of x at once: their int32 results are twice as large as what is wanted
NARROWED_AT_ONCE = 1 << 20  # values of a weight: what lies between stays in the cache
SCALED_AT_ONCE = 32  # rows of the result: what lies between stays in the cache
TRIED = 64  # rows and columns of the product that is tried
_LEAST = 1e-12  # rows that are smaller are zeros


@functools.cache
def multiplied_here() -> bool:
    """Whether this CPU is fast at it and torch has the product: it is tried once."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # torch's own test
    return supported is not None and supported() and torch.backends.mkldnn.is_available() and works()


def works() -> bool:
    """Whether a product of which the result is known comes out right; in the log if not."""
    x, scratch = torch.eye(TRIED, dtype=WIDE, device="cpu") * LARGEST, Scratch()
    scale = torch.tensor(1 / LARGEST, device="cpu", dtype=torch.float32)
    stored = torch.arange(TRIED * TRIED, device="cpu").remainder(31).sub(15).view(TRIED, TRIED).to(STORED)
    try:
        with torch.inference_mode():
            y = product(x, *narrowed(stored, scale, scratch), x[0], scratch)
    except (RuntimeError, AttributeError) as error:
        logger.info("fp8 weights are widened: %s", error)
        return False
    return torch.allclose(y, stored.t().to(WIDE) + x[0])


def fits(weight: Tensor) -> bool:
    """Whether a weight [out, in] is stored so that it can be narrowed, and large enough to be worth it."""
    return weight.dtype == STORED and min(weight.shape) >= LEAST_SIDE


def narrowed(weight: Tensor, scale: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """A weight in e4m3 in whole numbers, and what its rows are to be multiplied with.

    Args:
        weight: e4m3 [out, in].
        scale: of the weight, one number or one for each row; None is 1.
        scratch: where it is widened, a piece at a time.

    Returns:
        int8 [out, in]; float32 [out], NaN for a row that has one.
    """
    whole = torch.empty(weight.shape, device=weight.device, dtype=torch.int8)
    units = torch.empty(len(weight), 1, device=weight.device, dtype=torch.float32)
    at_once = max(1, NARROWED_AT_ONCE // weight.shape[1])
    if torch.compiler.is_compiling():  # a loop would be unrolled
        at_once = len(weight)
    else:
        ask_for_large(whole)
    parts = (part.split(at_once) for part in (weight, whole, units))
    for stored, out, unit in zip(*parts, strict=True):
        largest = stored.view(torch.int8).bitwise_and(MAGNITUDE).amax(-1, keepdim=True).view(STORED).float()
        unit.copy_(torch.exp2(torch.frexp(largest).exponent - float(BITS)))
        unit.add_(0 * largest)  # which is NaN where that is
        out.copy_(widen(stored, torch.float32, scratch).mul_(unit.reciprocal()).round_())  # bf16 takes longer
    factors = units.flatten()
    return whole, factors if scale is None else factors * scale.float().flatten()


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
    """x W^T + b.

    Args:
        x: bf16 [..., in]; rounded to whole numbers, each row scaled so that its largest is `LARGEST`.
        weight: int8 [out, in]; times its scale it is W.
        scale: float32 [out].
        bias: bf16 [out].
        scratch: where the results lie that are not scaled yet.

    Returns:
        bf16 [..., out]. A row of x that is not finite gives one that is not.
    """
    rows = x.reshape(-1, x.shape[-1])
    added = rows.new_zeros((), dtype=torch.float32) if bias is None else bias.float()
    if torch.compiler.is_compiling():  # as above; what follows the sums becomes one pass
        whole, factors = rounded(rows)
        y = torch.addcmul(added, torch._int_mm(whole, weight.t()) * scale, factors.float()).to(x.dtype)
        return y.view(*x.shape[:-1], -1)
    y = rows.new_empty(len(rows), len(weight))
    for some, out in zip(rows.split(ROWS), y.split(ROWS), strict=True):
        whole, factors = rounded(some)
        sums = scratch.take(out.shape, torch.int32)
        torch._int_mm(whole, weight.t(), out=sums)
        parts = (part.split(SCALED_AT_ONCE) for part in (sums, factors.float(), out))
        for few, factor, place in zip(*parts, strict=True):
            place.copy_(torch.addcmul(added, few * scale, factor))
    return y.view(*x.shape[:-1], -1)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows bf16 [N, in] as int8 [N, in] and the bf16 [N, 1] that they are to be multiplied with."""
    factors = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(_LEAST)
    return (rows / factors).round_().to(torch.int8), factors

"""Products in fp8 (e4m3), where a GPU has them: twice as fast as bf16, and the weight is never widened.

x W^T with each row of x and of W scaled by its own factor (torchao and vLLM call it "dynamic, row-wise"):
weights are stored so, what they are multiplied with is rounded to 3 bits of mantissa at each product. That is
about 3% of relative error, as random as rounding is. Through `torch._scaled_mm`, which CUDA devices have from
compute capability 8.9 on; a CPU computes it too, slowly, which serves tests.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

STORED = torch.float8_e4m3fn
WIDE = torch.bfloat16  # what is multiplied with; CUDA gives no other result of row-wise scales
CAPABILITY = (8, 9)  # compute capability of the first GPUs with fp8 products
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # of which rows and columns of a weight must be
TRIED = 128  # rows and columns of the product that is tried
_LEAST = 1e-12  # rows that are smaller are zeros


@functools.cache
def multiplied_on(device: torch.device) -> bool:
    """Whether a device is a GPU that has these products, and this torch calls them: it is tried once."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
    return capable and works_on(device)


def works_on(device: torch.device) -> bool:
    """Whether a product of which the result is known comes out right; in the log if not."""
    x = torch.eye(TRIED, dtype=WIDE, device=device)
    try:
        with torch.inference_mode():
            y = product(x, x.to(STORED), row_scales(None, TRIED).to(device), x[0])
    except torch.OutOfMemoryError:
        raise  # tells nothing about the product
    except (RuntimeError, ValueError) as error:
        logger.info("fp8 weights are widened: %s", error)
        return False
    return torch.equal(y, x + x[0])


def fits(weight: Tensor) -> bool:
    """Whether a weight [out, in] is stored so that it can be multiplied without being widened."""
    return weight.dtype == STORED and all(side % MULTIPLE == 0 for side in weight.shape)


def row_scales(scale: Tensor | None, rows: int) -> Tensor:
    """Scales of a weight's rows, float32 [1, rows], from one for each, one for all, or none."""
    found = torch.ones(1, device="cpu", dtype=torch.float32) if scale is None else scale.float()
    return found.reshape(1, -1).expand(1, rows).contiguous()


def product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b.

    Args:
        x: bf16 [..., in]; rounded to e4m3, each row scaled so that its largest number is `LARGEST`.
        weight: e4m3 [out, in]; times its scale it is W.
        scales: float32 [1, out].
        bias: bf16 [out].

    Returns:
        bf16 [..., out].
    """
    narrow, factors = rounded(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(
        narrow, weight.t(), scale_a=factors, scale_b=scales, bias=bias, out_dtype=WIDE, use_fast_accum=True
    )
    return y.view(*x.shape[:-1], -1)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, in] as e4m3 [N, in] and the float32 [N, 1] that they are to be multiplied with.

    The factor is rounded to bf16 first, so that one product in bf16 scales the row; what that rounding adds
    to the largest number is far below what e4m3 rounds down again.
    """
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True).float()
    factor = (LARGEST / largest.clamp_min(_LEAST)).to(rows.dtype)
    return (rows * factor).to(STORED), factor.float().reciprocal()

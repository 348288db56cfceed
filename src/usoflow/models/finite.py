"""The rule that no stage hands on values that are not numbers: whoever computed them is named."""

from __future__ import annotations

import torch
from torch import Tensor

from usoflow.errors import UsoflowError


def require_finite(values: Tensor, stage: str) -> Tensor:
    """`values` unchanged.

    Raises:
        UsoflowError: `non_finite`, naming the stage, if any of them is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise UsoflowError("non_finite", f"{stage} gave values that are not finite.")
    return values

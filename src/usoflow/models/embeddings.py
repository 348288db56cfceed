"""What the transformer is given instead of pictures, places and times: tokens, rotations, waves.

Formulas: black-forest-labs/flux, src/flux/math.py and modules/layers.py (Apache-2.0), and what each names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from usoflow.models.flux_config import PATCH

TIME_DIM = 256  # sinusoidal features of timestep and guidance

Rope = tuple[Tensor, Tensor]  # cos, sin: float32 [tokens, head_dim / 2]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of neighbouring features by its token's angle, in fp32 (RoFormer, arXiv 2104.09864).

    Args:
        x: [B, L, ..., D].
        rope: of its tokens.
    """
    cos, sin = (table.view(len(table), *[1] * (x.ndim - 3), -1) for table in rope)  # [L, ..., D / 2]
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers know no complex numbers; this becomes one pass
        signs = torch.arange(-1, 2, 2, device=x.device)
        turned = pairs * cos[..., None] + pairs.flip(-1) * signs * sin[..., None]
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.to(x.dtype).flatten(-2)


def rotary_table(ids: Tensor, axes: Sequence[int], theta: int) -> Rope:
    """cos and sin for position ids [L, axes]; angles in fp64, as positions times theta^(-2i/d).

    The ids lie on the CPU, since not every device has fp64.
    """
    angles = []
    for position, dim in zip(ids.double().unbind(-1), axes, strict=True):
        exponent = torch.arange(0, dim, 2, device=ids.device, dtype=torch.float64) / dim
        angles.append(position[:, None] * theta**-exponent)
    joined = torch.cat(angles, dim=-1)  # [L, D / 2]
    return joined.cos().float(), joined.sin().float()


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoidal features of times in 0..1 or of guidances, scaled by 1000.

    [B] -> float32 [B, 256], cosines first.
    """
    half = TIME_DIM // 2
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def patchify(latent: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, tokens, C * 4], features in the order (channel, row, column).

    Odd sides are padded by wrapping around, as the reference does.
    """
    height, width = latent.shape[-2:]
    if height % PATCH or width % PATCH:
        latent = F.pad(latent, (0, width % PATCH, 0, height % PATCH), mode="circular")
    return F.pixel_unshuffle(latent, PATCH).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `patchify` for a latent of this shape, cropping what was padded."""
    height, width = shape[-2:]
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    latent = F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns), PATCH)
    return latent[..., :height, :width]

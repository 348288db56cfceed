"""Block-quantised weights of GGUF files: from bytes to numbers, in torch, on whatever device they are.

The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h): a row is cut
into blocks of 32 or 256 values, each with scales of its own. Weights stay as bytes and are widened when used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from usoflow.models.tensor_header import QUANTISED


def dequantise(data: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Numbers of a quantised matrix.

    Args:
        data: uint8 [rows, bytes of a row].
        kind: a key of `tensor_header.QUANTISED`.
        dtype: of the result; in between it is computed in float32.

    Returns:
        [rows, columns].
    """
    blocks = data.reshape(-1, QUANTISED[kind].bytes)  # [N, bytes]
    return _KINDS[kind](blocks).to(dtype).reshape(data.shape[0], -1)


def _q8_0(blocks: Tensor) -> Tensor:
    """scale f16, 32 x int8."""
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _q4_0(blocks: Tensor) -> Tensor:
    """scale f16, 32 x 4 bits: the lower halves of 16 bytes, then the upper; less 8."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q5_0(blocks: Tensor) -> Tensor:
    """scale f16, 32 fifth bits, 32 x 4 bits; less 16."""
    fifth = _bits(blocks[:, 2:6])
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | fifth << 4).float() - 16)


def _q4_k(blocks: Tensor) -> Tensor:
    """scale and offset f16, 8 x 6 bits of each, 256 x 4 bits."""
    values = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))  # [N, 4, 64]: sub-blocks two by two
    return _scaled_sub_blocks(blocks, values.reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    """The same with 256 fifth bits between: bit s of byte i is that of value i of sub-block s."""
    values = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    fifth = blocks[:, None, 16:48] >> shifts[:, None] & 1  # [N, 8, 32]
    return _scaled_sub_blocks(blocks, values | fifth << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    """256 x 4 lower bits, 256 x 2 upper bits, 16 x int8 scales, scale f16; less 32."""
    lower = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts[:, None] & 3  # [N, 2, 4, 32]
    values = (lower | upper << 4).float().reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    return values * scales[:, :, None]


def _scaled_sub_blocks(blocks: Tensor, values: Tensor) -> Tensor:
    """values [N, 8, 32] times their 6-bit scales, less their 6-bit offsets."""
    scales, offsets = _six_bits(blocks[:, 4:16])
    scale, offset = _half(blocks, 0) * scales, _half(blocks, 2) * offsets  # [N, 8]
    return scale[:, :, None] * values - offset[:, :, None]


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes hold 8 scales and 8 offsets of 6 bits; the spare bits of the first four are the others'."""
    a, b, c = packed.split(4, dim=1)
    scales = torch.cat([a & 63, c & 15 | (a >> 6) << 4], dim=1)
    offsets = torch.cat([b & 63, c >> 4 | (b >> 6) << 4], dim=1)
    return scales, offsets


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a place in each block: float32 [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2 n] values: the lower halves of all, then the upper."""
    return torch.cat([data & 15, data >> 4], dim=-1)


def _bits(data: Tensor) -> Tensor:
    """[N, n] bytes to [N, 8 n] bits, the lowest first."""
    shifts = torch.arange(8, device=data.device, dtype=torch.uint8)
    return (data[:, :, None] >> shifts & 1).flatten(1)


_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"Q8_0": _q8_0, "Q5_0": _q5_0, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
)

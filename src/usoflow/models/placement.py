"""Where weights live while they are needed: which device computes, in which dtype, and when encoders leave.

The transformer stays on the device between runs; encoders and VAE are borrowed for one computation and give
their device memory back. On a CPU nothing moves: weights are memory-mapped pages of the file.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self, TypeVar

import torch
from torch import nn

from usoflow.errors import UsoflowError

M = TypeVar("M", bound=nn.Module)

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which device computes, and in which dtype the transformer does (encoders and VAE choose their own)."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str = "auto", dtype: str = "auto") -> Self:
        """From what a user asks for: `auto`, `cpu`, `cuda`, `mps`; `auto`, `bf16`, `fp16`, `fp32`.

        Raises:
            UsoflowError: `device_unavailable`.
        """
        chosen = torch.device(_best_device() if device == "auto" else device)
        if chosen.type not in _devices():
            raise UsoflowError("device_unavailable", f"There is no {device} device here.")
        return cls(chosen, _best_dtype(chosen) if dtype == "auto" else DTYPES[dtype])

    @property
    def vae_dtype(self) -> torch.dtype:
        """bf16 where the device computes it well, as the reference does; fp32 on a CPU and on request."""
        return torch.float32 if self.device.type == "cpu" or self.dtype == torch.float32 else torch.bfloat16

    def settle(self, module: M) -> M:
        """The module with its parameters on the device, to stay."""
        if self.device.type != "cpu":
            module.to(self.device)
        return module

    @contextmanager
    def borrow(self, module: M) -> Iterator[M]:
        """The module on the device for a while; then its memory-mapped parameters are put back."""
        if self.device.type == "cpu":
            yield module
            return
        home = {name: parameter.data for name, parameter in module.named_parameters()}
        module.to(self.device)
        try:
            yield module
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = home[name]


def _devices() -> list[str]:
    """Kinds of device here, the fastest first."""
    found = ["cuda"] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _best_device() -> str:
    return _devices()[0]


def _best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, else what is fastest without surprises."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 instructions; oneDNN also emulates bf16 on AVX-512, slower than fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

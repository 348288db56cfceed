"""Where weights live while they are needed: which device computes, in which dtype, within how much memory.

The transformer stays on the device between runs, as far as the budget goes (`residence`); encoders and VAE
are borrowed for one computation and give their device memory back. On a CPU nothing moves: the weights of
encoders and VAE are memory-mapped pages of the file, and those of T5 pass through.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Self, TypeVar

import psutil
import torch
from torch import nn

from usoflow.errors import UsoflowError
from usoflow.models import pages, residence

M = TypeVar("M", bound=nn.Module)

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
)


PART_OF_CPU, PART_OF_GPU = 0.6, 0.8  # of what is free, for the transformer's weights
PART_PINNED = 0.5  # of the host's free memory, for weights on their way to a GPU
PART_FOR_WORK = 0.9  # of what is free, for one computation
SMALLER = 0.5  # the next plan's budget, after memory ran out
CONTAINER = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
OUT_OF_MEMORY = (  # words of the system, of Metal, of cuBLAS and cuDNN
    "allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placement:
    """Which device computes, and in which dtype the transformer does (encoders and VAE choose their own).

    Attributes:
        budget: bytes for the transformer's weights; None is a part of what is free when they are loaded.
        compiled: whether the transformer's blocks are compiled, from the second picture of a size on.
        fastest: whether blocks' weights that are stored in fp8 are multiplied in 8 bits, where the device is
            faster at it (`fp8`, `int8`), and a CPU that computes in bf16 does so for T5 and VAE, too.
    """

    device: torch.device
    dtype: torch.dtype
    budget: int | None = None
    compiled: bool = False
    fastest: bool = False

    @classmethod
    def choose(
        cls,
        device: str = "auto",
        dtype: str = "auto",
        budget: int | None = None,
        *,
        compiled: bool | None = None,
    ) -> Self:
        """From what a user asks for: `auto`, `cpu`, `cuda`, `mps`; `auto`, `bf16`, `fp16`, `fp32`; bytes.

        `compiled` is by default so on CUDA only; `fastest` if the dtype is left to us.

        Raises:
            UsoflowError: `device_unavailable`.
        """
        try:
            chosen = torch.device(_best_device() if device == "auto" else device)
        except RuntimeError:
            raise UsoflowError("device_unavailable", f"{device!r} is no device.") from None
        if chosen.index is not None:  # streams and events are those of the current device
            raise UsoflowError(
                "device_unavailable",
                f"{device!r} names one of several devices.",
                remedy=f"Say {chosen.type}, and choose among several with CUDA_VISIBLE_DEVICES.",
            )
        if chosen.type not in _devices():
            raise UsoflowError("device_unavailable", f"There is no {device} device here.")
        if chosen.type == "cuda":
            chosen = _current_gpu()
        if dtype not in ("auto", *DTYPES):
            raise UsoflowError(
                "device_unavailable", f"{dtype!r} is not a dtype: choose auto, {', '.join(DTYPES)}."
            )
        dtype_ = _best_dtype(chosen) if dtype == "auto" else DTYPES[dtype]
        compiled = chosen.type == "cuda" if compiled is None else compiled
        return cls(chosen, dtype_, budget, compiled, fastest=dtype == "auto")

    @property
    def vae_dtype(self) -> torch.dtype:
        """bf16 where the transformer has it, as the reference does; fp32 elsewhere.

        On a CPU, who asks for bf16 asks for the transformer's.
        """
        narrow = self.dtype == torch.bfloat16 and (self.fastest or self.device.type != "cpu")
        return torch.bfloat16 if narrow else torch.float32

    @property
    def t5_dtype(self) -> torch.dtype:
        """Of T5's products; the reference computes them in fp32. A vision tower may need that."""
        narrow = self.fastest and self.device.type == "cpu" and self.dtype == torch.bfloat16
        return torch.bfloat16 if narrow else torch.float32

    @property
    def weight_bytes(self) -> int:
        """How much the transformer's weights may take now."""
        if self.budget is not None:
            return self.budget
        if self.device.type == "cuda":
            return int(PART_OF_GPU * _free_on_gpu(self.device))
        return int(PART_OF_CPU * free_memory())

    @property
    def room(self) -> int:
        """Bytes that a computation beside the transformer may take now."""
        free = _free_on_gpu(self.device) if self.device.type == "cuda" else free_memory()
        return min(int(PART_FOR_WORK * free), sys.maxsize if self.budget is None else self.budget)

    @property
    def room_for_copies(self) -> int:
        """Bytes of the host's memory that weights in another dtype than the file's may take now."""
        if self.device.type == "mps":
            return 0
        return self.weight_bytes if self.device.type == "cpu" else int(PART_OF_CPU * free_memory())

    @property
    def smaller(self) -> Self:
        """The same with half of the memory for weights: where it ran out."""
        return replace(self, budget=int(SMALLER * self.weight_bytes))

    def settle(self, module: M, blocks: Sequence[nn.Module] = (), *, as_stored: bool = False) -> M:
        """The module with its parameters on the device, to stay.

        Args:
            module: all of it.
            blocks: of the transformer, in the order of their use, to be held within the budget. Not in
                training: where gradients may be asked for, all weights are there as the file has them.
            as_stored: never widened for good, however much memory there is.
        """
        budgeted = bool(blocks) and not torch.is_grad_enabled()
        if budgeted and self.device.type == "cpu":
            residence.settle_on_cpu(
                module, blocks, self.dtype, self.weight_bytes,
                as_stored=as_stored, packed=not self.compiled, eight_bits=self.fastest,
            )  # fmt: skip
        elif budgeted and self.device.type == "cuda":
            pinned = int(PART_PINNED * free_memory())
            residence.settle_on_gpu(
                module, blocks, self.device, self.weight_bytes, pinned=pinned, eight_bits=self.fastest
            )
        elif self.device.type != "cpu":
            _move(module, self.device)
        return module

    def fits(self, needed: int, *, freed: int = 0) -> bool:
        """Whether so many bytes can be had beside what is on the device, less `freed` bytes of that."""
        return self.device.type != "cuda" or needed <= PART_FOR_WORK * (_free_on_gpu(self.device) + freed)

    @property
    def on_cpu(self) -> Self:
        """For what the device has no room for: the CPU, with its own memory and in its own dtype."""
        if self.device.type == "cpu":
            return self
        cpu = torch.device("cpu")
        return replace(self, device=cpu, dtype=_best_dtype(cpu), budget=None)

    @contextmanager
    def borrow(self, module: nn.Module, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """The module on the device for a while; then its memory-mapped parameters are put back.

        Args:
            module: all of it.
            blocks: of T5, in the order of their use: on a CPU they pass through.
        """
        if self.device.type == "cpu":
            with residence.passing_once(module, blocks, self.t5_dtype) if blocks else nullcontext():
                yield
            return
        home = {name: parameter.data for name, parameter in module.named_parameters()}
        try:
            _move(module, self.device)
            yield
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = home[name]


def _move(module: nn.Module, device: torch.device) -> None:
    pages.bring(pages.mapped(module.parameters()))  # else they come one by one, as they are touched
    if device.type == "mps":
        widen_fp8(module)
    module.to(device)


def widen_fp8(module: nn.Module) -> None:
    """Hold what is stored in fp8 in bf16, which has all of its values: Metal has no fp8 (pytorch#148420)."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.itemsize == 1:
            parameter.data = parameter.data.to(torch.bfloat16)


def _free_on_gpu(device: torch.device) -> int:
    """Bytes that could be had, with those that torch keeps for its next tensors."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + idle


def is_out_of_memory(error: BaseException) -> bool:
    """Also where torch raises a bare RuntimeError with the words of whoever had none left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def memory() -> int:
    """Bytes of the machine, or of the container that the process is in."""
    return min(psutil.virtual_memory().total, *map(_limit, _groups()))


def free_memory() -> int:
    """Bytes that could be had without swapping, here and in the container that the process is in."""
    return min(psutil.virtual_memory().available, *map(_free_in_container, _groups()))


def _groups() -> list[Path]:
    """The control groups (cgroup v2) that the process is in, from its own to the root, as it sees them.

    A container mostly sees its own as the root; a job of Slurm or systemd is in one below.
    """
    try:
        lines = OWN_GROUP.read_bytes().split(b"\n")
    except OSError:  # not Linux
        lines = []
    own = next((os.fsdecode(line[4:]) for line in lines if line.startswith(b"0::/")), "")
    path = CONTAINER / own
    return [group for group in (path, *path.parents) if group.is_relative_to(CONTAINER)]


def _limit(group: Path) -> int:
    """The most bytes of a control group; where there is none no limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
    except OSError:
        return sys.maxsize
    return sys.maxsize if limit == "max" else int(limit)


def _free_in_container(group: Path) -> int:
    """Bytes below a control group's limit.

    Pages of files count as used there, though the kernel takes them back when they are needed.
    """
    limit = _limit(group)
    if limit == sys.maxsize:
        return limit
    try:
        used, parts = int((group / "memory.current").read_text()), (group / "memory.stat").read_text()
    except OSError:
        return limit
    of_files = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", parts, re.MULTILINE)))
    return max(0, limit - max(0, used - of_files))


def _devices() -> list[str]:
    """Kinds of device here, the fastest first."""
    found = ["cuda"] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _current_gpu() -> torch.device:
    """With its number: without, each thread would take its own current one. It is tried, too.

    Raises:
        UsoflowError: `device_unavailable` if it is busy or full, or this torch has no kernels for it.
    """
    try:
        found = torch.device("cuda", torch.cuda.current_device())
        _compute_on(found)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsoflowError(
            "device_unavailable",
            f"The GPU is there but cannot be used: {reason}",
            remedy="End what else uses it, or install a torch that is built for it (https://pytorch.org); "
            "`--device cpu` works without it.",
        ) from None
    return found


def _compute_on(device: torch.device) -> None:
    torch.ones(1, device=device).add(1).item()


def _best_device() -> str:
    return _devices()[0]


def _best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, else what is fastest without surprises."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 instructions; oneDNN also emulates bf16 on AVX-512, slower than fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)  # Apple's builds lack oneDNN
    return bool(supported())

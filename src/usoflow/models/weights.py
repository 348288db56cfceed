"""How a weight is stored, and the layers that every network here is built from.

A module holds its weights as the file stores them (fp32, bf16, fp16, fp8), until `residence` lays them
otherwise, and computes in the dtype of its input: each layer widens its weight when it is used. `assemble`
fills a module from a `checkpoint.Component` by assignment of memory-mapped tensors; nothing is copied until
it is needed.

fp8 with `scale_weight`: the stored value times the scale is the weight (layout of ComfyUI's "scaled fp8"
files, one fp32 scalar or one per row beside each weight).
"""

from __future__ import annotations

import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.errors import UsoflowError, some
from usoflow.models import fp8, int8
from usoflow.models.checkpoint import SCALE, Component, matches_any
from usoflow.models.kernels import Scratch, fast, has_nan, linear, widen
from usoflow.models.quantised import dequantise
from usoflow.models.tensor_header import QUANTISED, TensorInfo

_NO_RESERVE = 0x4000  # mmap(2): MAP_NORESERVE
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
# Of fp8 matmuls: scales of activations, ours are those of each row; and what the layer is stored as, told as
# JSON: in another format than fp8 it has further tensors or another dtype.
UNUSED_SCALES = ("*.scale_input", "*.input_scale", "*.comfy_quant")

M = TypeVar("M", bound=nn.Module)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


class LowRank(nn.Module):
    """A low-rank branch beside a linear layer: adds strength * up @ down @ x to some of its output rows.

    LoRA (arXiv 2106.09685). The weight itself is never changed, so that handles with different LoRAs share
    it, and the sum is exact whatever the weight's storage.

    Args:
        down: [rank, in].
        up: [rows, rank].
        strength: factor; negative and fractional values are usual. Held as a tensor, for which a compiler
            makes no variant of its own.
        first_row: where the rows begin in the layer's output.
    """

    def __init__(self, down: Tensor, up: Tensor, *, strength: float, first_row: int = 0) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=down.requires_grad)
        self.up = nn.Parameter(up, requires_grad=up.requires_grad)
        factor = torch.tensor([strength], device=down.device, dtype=torch.float32)
        self.strength = nn.Parameter(factor, requires_grad=False)
        self.rows = slice(first_row, first_row + up.shape[0])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch's part for x [..., in] to the layer's output y [..., out], in place."""
        inner = (F.linear(x, self.down.to(x.dtype)) * self.strength).to(x.dtype)  # [..., rank]
        y[..., self.rows].add_(F.linear(inner, self.up.to(x.dtype)))
        return y


class Linear(nn.Module):
    """y = x W^T + b, weight [out, in] in any storage dtype, with optional scale and low-rank branches.

    A weight of a GGUF file is held as bytes [out, bytes of a row]; `quantised` then names its format.
    `scratch`, which the layers of a network share, is where weights are widened on a CPU. With `row_scales`
    an fp8 weight is not widened at all, where the input is bf16 and no gradient is asked for (`fp8`); nor is
    one `in_int8`, whose numbers become whole ones at each use, unless it is held so (`int8`). `multiplied_in`
    is a narrower dtype than the input's for the product alone, where no gradient is asked for.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.quantised: str | None = None
        self.weight = _parameter(out_features, in_features)
        self.bias = _parameter(out_features) if bias else None
        self.scale_weight: Tensor | None = None
        self.scratch: Scratch | None = None
        self.row_scales: Tensor | None = None
        self.in_int8 = False
        self.multiplied_in: torch.dtype | None = None
        self.branches = nn.ModuleList()
        self.regular: bool | None = None  # an fp8 weight without NaNs; None: not looked at yet

    def share_storage(self, other: Linear) -> None:
        """Hold the weight as another layer of this shape does, whose parameters are shared already."""
        self.scale_weight, self.quantised = other.scale_weight, other.quantised
        self.scratch, self.regular, self.row_scales = other.scratch, other.regular, other.row_scales
        self.in_int8, self.multiplied_in = other.in_int8, other.multiplied_in

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x; through GELU (tanh approximation) on request."""
        narrow = x.dtype if self.multiplied_in is None or torch.is_grad_enabled() else self.multiplied_in
        return self._multiplied(x.to(narrow), gelu=gelu).to(x.dtype)

    def _multiplied(self, x: Tensor, *, gelu: bool) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        may_be_rounded = x.dtype == fp8.WIDE and not torch.is_grad_enabled()
        if may_be_rounded and self.row_scales is not None:
            y = fp8.product(x, self.weight, self.row_scales, bias)
        elif may_be_rounded and self.in_int8:
            assert self.scratch is not None
            y = int8.product(x, *self._whole_numbers(self.scratch), bias, self.scratch)
        elif len(self.branches) > 0:  # torch 2.6 compiles a mere `self.branches` without a guard
            y = linear(x, self._weight(x), bias)
        else:
            return linear(x, self._weight(x), bias, gelu=gelu)
        for branch in self.branches:
            y = branch(x, y)
        return F.gelu(y, approximate="tanh") if gelu else y

    def multiply_in_fp8(self, device: torch.device) -> None:
        """Multiply in fp8 on this device from now on, if the weight is stored so and its sides allow it."""
        if self.quantised is None and fp8.fits(self.weight):
            self.row_scales = fp8.row_scales(self.scale_weight, self.shape[0]).to(device)

    def multiply_in_int8(self, scratch: Scratch) -> None:
        """Multiply in int8 from now on, if the weight is stored so that it can be, and is large enough."""
        if self.quantised is None and int8.fits(self.weight):
            self.in_int8, self.scratch = True, scratch

    def hold_in_int8(self) -> None:
        """Hold the weight in whole numbers, if it is multiplied so; they take as many bytes."""
        if self.in_int8:
            assert self.scratch is not None
            weight, self.scale_weight = self._whole_numbers(self.scratch)
            self.weight = nn.Parameter(weight, requires_grad=False)

    def _whole_numbers(self, scratch: Scratch) -> tuple[Tensor, Tensor]:
        if self.weight.dtype == torch.int8 and self.scale_weight is not None:
            return self.weight, self.scale_weight
        return int8.narrowed(self.weight, self.scale_weight, scratch)

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a dtype, its scale applied; the stored one if that is the same."""
        return self._weight(torch.empty(0, dtype=dtype, device=self.weight.device))

    def _weight(self, x: Tensor) -> Tensor:
        if self.quantised is not None:
            return dequantise(self.weight, self.quantised, x.dtype)
        weight = self._widened(x)  # a new tensor or the scratch, if it is not of that dtype already
        if self.scale_weight is None:
            return weight
        scale = self.scale_weight.to(x.device)
        # By a mere number a CPU multiplies before it rounds.
        factor = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1).to(x.dtype)
        ours = weight.dtype != self.weight.dtype and not torch.is_grad_enabled()
        return weight.mul_(factor) if ours else weight * factor

    def _widened(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self.weight.to(x.dtype)
        if self.weight.is_mkldnn:  # packed for the usual dtype, where no gradient is asked for
            as_packed = x.dtype == self.weight.dtype and fast(x)
            return self.weight if as_packed else self.weight.to_dense().to(x.dtype)
        if self.regular is None:
            self.regular = self.weight.dtype != torch.float8_e4m3fn or not has_nan(self.weight)
        return widen(self.weight, x.dtype, self.scratch) if self.regular else self.weight.to(x.dtype)


class Conv2d(nn.Module):
    """2-D convolution, weight [out, in, k, k]."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0
    ):
        super().__init__()
        self.weight = _parameter(out_channels, in_channels, kernel, kernel)
        self.bias = _parameter(out_channels)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class LayerNorm(nn.Module):
    """Layer norm over the last axis; `affine=False` has no parameters (FLUX modulates instead)."""

    def __init__(self, dim: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = (dim,), eps
        self.weight = _parameter(dim) if affine else None
        self.bias = _parameter(dim) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return F.layer_norm(x, self.dim, eps=self.eps)
        return F.layer_norm(x, self.dim, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; FLUX names its parameter `scale`, T5 `weight`."""

    def __init__(self, dim: int, eps: float, name: str = "weight") -> None:
        super().__init__()
        self.dim, self.eps, self.name = (dim,), eps, name
        self.register_parameter(name, _parameter(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.dim, self.get_parameter(self.name).to(x.dtype), self.eps)


class GroupNorm(nn.Module):
    """Group norm over channels."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = _parameter(channels), _parameter(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...]."""
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Embedding(nn.Module):
    """A table [rows, dim]; rows are widened to fp32 after the look-up, the table stays as stored."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = _parameter(rows, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 [...] -> float32 [..., dim]."""
        if self.weight.itemsize == 1:  # not every torch gathers fp8: look up the raw bytes
            return F.embedding(ids, self.weight.view(torch.uint8)).view(self.weight.dtype).float()
        return F.embedding(ids, self.weight).float()


def build(component: Component, make: Callable[[], M], *, ignored: Sequence[str] = ()) -> M:
    """`make()` on the meta device, filled from the file. The usual way to get a model that computes."""
    with torch.device("meta"):
        module = make()
    assemble(component, module, ignored=ignored)
    return module.eval()


def assemble(component: Component, module: nn.Module, *, ignored: Sequence[str] = ()) -> None:
    """Fill every parameter of `module` with the tensor of the same name, as stored and memory-mapped.

    Args:
        component: the tensors; names without the file's prefix equal the module's parameter names.
        module: usually built on the meta device; its parameters are replaced, not copied into.
        ignored: patterns of tensors that the file may hold and the model does not use.

    Raises:
        UsoflowError: `tensor_missing`, `tensor_unknown`, `tensor_shape`, `model_damaged`.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    layers = ((name, part) for name, part in module.named_modules() if isinstance(part, Linear))
    named = ((f"{name}.{SCALE}", layer) for name, layer in layers)
    scales = {name: layer.shape[0] for name, layer in named if name in component.tensors}
    _check_names(component, wanted, scales, (*ignored, *UNUSED_SCALES))
    _check_shapes(component, wanted)
    _check_scales(component, scales)
    for name, tensor in read_tensors(component, [*wanted, *scales]).items():
        owner, _, leaf = name.rpartition(".")
        holder, format_ = module.get_submodule(owner), component.tensors[name].dtype
        if leaf == SCALE:
            holder.scale_weight = tensor.float()
        elif format_ in QUANTISED:
            _hold_quantised(holder, leaf, tensor, format_)
        else:
            setattr(holder, leaf, nn.Parameter(tensor, requires_grad=False))


def _hold_quantised(holder: nn.Module, leaf: str, data: Tensor, format_: str) -> None:
    """Matrices of linear layers stay as bytes; anything else is widened once."""
    if isinstance(holder, Linear) and leaf == "weight":
        holder.weight, holder.quantised = nn.Parameter(data, requires_grad=False), format_
    else:
        shape = getattr(holder, leaf).shape
        widened_once = dequantise(data.reshape(1, -1), format_, torch.float32).view(shape)
        setattr(holder, leaf, nn.Parameter(widened_once, requires_grad=False))


def _check_names(
    component: Component, wanted: Iterable[str], scales: Iterable[str], ignored: Sequence[str]
) -> None:
    file = component.file.path.name
    missing = [component.prefix + name for name in wanted if name not in component.tensors]
    if missing:
        raise UsoflowError(
            "tensor_missing",
            f"{file} lacks {len(missing)} tensors: {some(missing)}.",
            remedy=component.file.one_of_several,
        )
    claimed = {*wanted, *scales}
    unknown = [n for n in component.tensors if n not in claimed and not matches_any(n, ignored)]
    if unknown:
        names = some(component.prefix + name for name in unknown)
        raise UsoflowError("tensor_unknown", f"{file} has {len(unknown)} tensors that nothing uses: {names}.")


def _check_shapes(component: Component, wanted: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        found = component.tensors[name].shape
        if found != shape:
            raise UsoflowError(
                "tensor_shape",
                f"{component.file.path.name}: {component.prefix}{name} is {list(found)}, not {list(shape)}.",
            )


def _check_scales(component: Component, scales: Mapping[str, int]) -> None:
    """Each is one number, or one for each of so many rows."""
    for name, rows in scales.items():
        found = component.tensors[name].shape
        if prod(found) not in (1, rows):
            raise UsoflowError(
                "tensor_shape",
                f"{component.file.path.name}: {component.prefix}{name} is {list(found)}, for {rows} rows.",
            )


def read_tensors(component: Component, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors as memory-mapped views: their bytes are read from disk when they are touched.

    Raises:
        UsoflowError: `model_missing`, `model_truncated`.
    """
    path = component.file.path
    try:
        with path.open("rb") as stream:
            _require_unchanged(component, os.fstat(stream.fileno()))
            data = _mapped(stream.fileno())
        return {name: _view(data, component.tensors[name]) for name in names}
    except OSError as error:
        raise UsoflowError("model_missing", f"{path} cannot be read: {error.strerror or error}.") from None


def _require_unchanged(component: Component, now: os.stat_result) -> None:
    """Where the tensors lie was read from a header that a file of the same name need not have any more."""
    file = component.file
    if now.st_size < file.bytes:
        raise UsoflowError("model_truncated", f"{file.path.name} became shorter while it was used.")
    if (now.st_size, now.st_mtime_ns) != file.fingerprint[1:]:
        raise UsoflowError(
            "model_missing",
            f"{file.path.name} was replaced by another file while it was used.",
            remedy="Run it again: it then takes the new file.",
        )


def _mapped(file: int) -> mmap.mmap:
    """A whole file, of which a page that is written to becomes a copy.

    None of it counts as memory that is asked for, unlike in those that the safetensors library makes: so
    the system lets a file be mapped that is larger than its memory. On Windows that takes a mapping to which
    nothing can be written.
    """
    if sys.platform == "win32":
        return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    flags = mmap.MAP_PRIVATE | (_NO_RESERVE if sys.platform == "linux" else 0)
    return mmap.mmap(file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _view(data: mmap.mmap, info: TensorInfo) -> Tensor:
    """One tensor; of a quantised one the bytes, [..., bytes of a row]."""
    dtype, shape = DTYPES.get(info.dtype, torch.uint8), info.shape
    if block := QUANTISED.get(info.dtype):
        shape = (*shape[:-1], shape[-1] // block.values * block.bytes)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of memory that cannot be written to
        return torch.frombuffer(data, dtype=dtype, count=prod(shape), offset=info.start).view(shape)

"""Layers compute in the dtype of their input whatever they store; a file fills a module wholly or not."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.finite import require_finite
from usoflow.models.weights import (
    DTYPES,
    Conv2d,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    build,
    read_tensors,
)

STORED = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def stored(module: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (Linear(6, 5), nn.Linear(6, 5), (2, 6)),
        (Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False), (2, 6)),
        (Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, 2, 1), (2, 3, 8, 8)),
        (LayerNorm(6, 1e-3), nn.LayerNorm(6, 1e-3), (2, 6)),
        (LayerNorm(6, 1e-3, affine=False), nn.LayerNorm(6, 1e-3, elementwise_affine=False), (2, 6)),
        (RMSNorm(6, 1e-3), nn.RMSNorm(6, 1e-3), (2, 6)),
        (GroupNorm(2, 6, 1e-3), nn.GroupNorm(2, 6, 1e-3), (2, 6, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_are_torchs_on_the_widened_weights(
    ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    stored(ours, dtype)
    theirs.load_state_dict({name: value.float() for name, value in ours.state_dict().items()})
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", STORED)
def test_embedding_rows_are_widened(dtype: torch.dtype) -> None:
    table = stored(Embedding(7, 3), dtype)
    ids = torch.tensor([[1, 6], [0, 1]])
    assert torch.equal(table(ids), table.weight.float()[ids])


def whole(path: Path) -> Component:
    file = TensorFile.open(path)
    return Component(file, "flux", "", file.tensors, {})


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Shapes of no and of one value, too; the name's length moves the data off whole words."""
    content = {
        f"{name}{shape}": torch.arange(6).reshape(2, 3)[index].to(dtype)
        for name, dtype in DTYPES.items()
        for shape, index in (("whole", ...), ("one", (1, 2)), ("none", slice(0, 0)))
    }
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, tmp_path / "a.safetensors")
    found = read_tensors(whole(tmp_path / "a.safetensors"), content)
    for name, tensor in content.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tolist() == tensor.tolist()


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    """A private, writable mapping of such a size is refused by Linux."""
    rows = (psutil.virtual_memory().total + psutil.swap_memory().total) // 2**20 + 1024
    entry = {"dtype": "U8", "shape": [rows, 2**20], "data_offsets": [0, rows * 2**20]}
    header = json.dumps({"a": entry}).encode()
    with (tmp_path / "a.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.seek(rows * 2**20 - 1, 1)  # a hole: it takes no room on the disk
        stream.write(b"\x07")
    found = read_tensors(whole(tmp_path / "a.safetensors"), ["a"])["a"]
    assert found.shape == (rows, 2**20)
    assert found[-1, -1] == 7


def test_what_is_written_to_weights_stays_out_of_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(5000)}, tmp_path / "a.safetensors")
    found, other = (read_tensors(whole(tmp_path / "a.safetensors"), ["a"])["a"] for _ in range(2))
    found.fill_(1)
    assert not other.any()
    assert not load_file(tmp_path / "a.safetensors")["a"].any()


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    component = whole(tmp_path / "a.safetensors")
    with (tmp_path / "a.safetensors").open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(UsoflowError, match="became shorter") as caught:
        read_tensors(component, ["a"])
    assert caught.value.code == "model_truncated"


def test_a_file_that_another_took_the_place_of(tmp_path: Path) -> None:
    """Its header may be of another length, so that other bytes lie where the tensor was."""
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    component = whole(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(100)}, tmp_path / "b.safetensors", {"note": "x" * 64})
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(UsoflowError, match=r"a\.safetensors was replaced") as caught:
        read_tensors(component, ["a"])
    assert "Run it again" in caught.value.remedy
    assert read_tensors(whole(tmp_path / "a.safetensors"), ["a"])["a"].tolist() == [1.0] * 100


def test_scales_of_fp8_under_the_newer_name(tmp_path: Path) -> None:
    """`weight_scale`, beside the scale of activations and what the layer says of its format."""
    weight = torch.randn(5, 6).to(torch.float8_e4m3fn)
    told = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    tensors = {
        "decoder.conv_in.weight": torch.ones(1), "part.weight": weight, "part.bias": torch.zeros(5),
        "part.weight_scale": torch.tensor(0.5), "part.input_scale": torch.ones(1), "part.comfy_quant": told,
    }  # fmt: skip
    save_file(tensors, tmp_path / "f.safetensors")
    found = TensorFile.open(tmp_path / "f.safetensors").component("vae")
    layer = build(found, lambda: Holder(Linear(6, 5)), ignored=("decoder.*",)).part
    x = torch.randn(2, 6)
    assert torch.allclose(layer(x), x @ (weight.float() * 0.5).T, atol=1e-6)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.rand(5), torch.rand(5, 1)])
def test_scaled_fp8(tmp_path: Path, scale: Tensor) -> None:
    """Stored value times scale, for the whole weight or by row; the activation scale is not used."""
    weight = torch.randn(5, 6).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "bias": torch.randn(5), "scale_weight": scale, "scale_input": torch.ones(1)}
    layer = build(component(tmp_path, tensors), lambda: Holder(Linear(6, 5))).part
    x = torch.randn(2, 6)
    expected = x @ (weight.float() * scale.reshape(-1, 1)).T + tensors["bias"]
    assert torch.allclose(layer(x), expected, atol=1e-6)


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def component(folder: Path, tensors: dict[str, Tensor]) -> Component:
    path = folder / "file.safetensors"
    save_file({f"vae.part.{name}": value for name, value in tensors.items()}, path)
    file = TensorFile.open(path)
    named = {name.removeprefix("vae."): info for name, info in file.tensors.items()}
    return Component(file, "vae", "vae.", named, {})


GOOD = {"weight": torch.ones(5, 6), "bias": torch.ones(5)}


@pytest.mark.parametrize(
    ("tensors", "code", "named"),
    [
        ({"weight": GOOD["weight"]}, "tensor_missing", "vae.part.bias"),
        (GOOD | {"extra": torch.ones(1)}, "tensor_unknown", "vae.part.extra"),
        (GOOD | {"weight": torch.ones(6, 5)}, "tensor_shape", "vae.part.weight"),
        (GOOD | {"scale_weight": torch.ones(6)}, "tensor_shape", "vae.part.scale_weight"),
        (GOOD | {"scale_weight": torch.ones(0)}, "tensor_shape", "vae.part.scale_weight"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, tensors: dict[str, Tensor], code: str, named: str) -> None:
    with pytest.raises(UsoflowError, match=named) as caught:
        build(component(tmp_path, tensors), lambda: Holder(Linear(6, 5)))
    assert caught.value.code == code


def test_a_scale_that_no_layer_would_apply_is_refused(tmp_path: Path) -> None:
    """Only matrices have scales; a table with one would be read wrongly."""
    table = {"weight": torch.ones(5, 6).to(torch.float8_e4m3fn), "scale_weight": torch.tensor(0.5)}
    with pytest.raises(UsoflowError, match=r"vae\.part\.scale_weight") as caught:
        build(component(tmp_path, table), lambda: Holder(Embedding(5, 6)))
    assert caught.value.code == "tensor_unknown"


def test_what_is_ignored_may_be_there(tmp_path: Path) -> None:
    tensors = GOOD | {"head": torch.ones(1)}
    module = build(component(tmp_path, tensors), lambda: Holder(Linear(6, 5)), ignored=("part.head",))
    assert torch.equal(module.part.weight, GOOD["weight"])


MEASURE = """
import sys
from pathlib import Path
import torch
from usoflow.models.checkpoint import TensorFile
from usoflow.models.loading import load_clip, load_flux, load_t5, load_vae
file = TensorFile.open(Path(sys.argv[1]))
loaders = {"flux": load_flux, "clip_l": load_clip, "t5": load_t5, "vae": load_vae}
modules = [load(file.component(kind)) for kind, load in loaders.items()]
total = 0
for module in modules:
    for parameter in module.parameters():
        total += int(parameter.detach().view(torch.uint8).flatten()[::512].sum())  # touch every page
assert any(p.dtype == torch.float8_e4m3fn for p in modules[0].parameters())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_fp8_stays_fp8_in_memory(synth_models: Path) -> None:
    """All weights of the fp8 checkpoint, every page touched: at most its size and 1 GB for the process."""
    path = synth_models / "checkpoints/flux1-dev-fp8.safetensors"
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= path.stat().st_size + 1e9


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinite_values_are_not_finite(value: float) -> None:
    with pytest.raises(UsoflowError, match="The VAE") as caught:
        require_finite(torch.tensor([1.0, value]), "The VAE")
    assert caught.value.code == "non_finite"

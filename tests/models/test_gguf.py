"""GGUF files against PyPI's `gguf`: its quantiser, its dequantiser, its writer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.placement import Placement
from usoflow.models.quantised import dequantise
from usoflow.models.tensor_header import QUANTISED
from usoflow.models.weights import Embedding, Linear, assemble

CPU32 = Placement(torch.device("cpu"), torch.float32)
CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_round_trip(kind: str) -> None:
    """What its quantiser makes is read as its dequantiser reads it, and is near the original."""
    original = np.random.default_rng(0).standard_normal((6, 256), dtype=np.float32)
    quantised = gguf.quantize(original, gguf.GGMLQuantizationType[kind])
    ours = dequantise(torch.from_numpy(quantised), kind, torch.float32)
    assert np.array_equal(ours.numpy(), gguf.dequantize(quantised, gguf.GGMLQuantizationType[kind]))
    levels = {"Q8_0": 254, "Q5_0": 31, "Q4_0": 15}[kind]
    largest = np.abs(original).reshape(6, -1, 32).max(-1)
    error = np.abs(ours.numpy() - original).reshape(6, -1, 32).max(-1)
    assert (error <= 2.2 * largest / levels).all()


@pytest.mark.parametrize("kind", QUANTISED)
def test_any_bytes_are_read_as_gguf_reads_them(kind: str) -> None:
    """Every bit pattern of the values; the float16 scales are kept finite."""
    block = QUANTISED[kind]
    type_ = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[type_] == (block.values, block.bytes)
    data = np.random.default_rng(1).integers(0, 256, (5, 3 * block.bytes), dtype=np.uint8)
    blocks = data.reshape(-1, block.bytes)
    places = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,))
    for place in places:
        scales = np.random.default_rng(place).uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    expected = gguf.dequantize(data, type_)
    assert np.array_equal(dequantise(torch.from_numpy(data), kind, torch.float32).numpy(), expected)
    narrow = dequantise(torch.from_numpy(data), kind, torch.bfloat16)
    assert torch.equal(narrow, torch.from_numpy(expected).bfloat16())


def write(path: Path, source: Path, kind: str) -> dict[str, Tensor]:
    """The transformer of a checkpoint as a GGUF file; returns its weights as the file holds them."""
    writer = gguf.GGUFWriter(path, "flux")
    held = {}
    with safe_open(source, framework="pt") as reader:
        for key in reader.keys():  # noqa: SIM118
            if not key.startswith("model.diffusion_model."):
                continue
            name, array = key.removeprefix("model.diffusion_model."), reader.get_tensor(key).float().numpy()
            type_ = gguf.GGMLQuantizationType[kind]
            if array.ndim == 2 and array.shape[1] % 32 == 0 and "blocks" in name:
                data = gguf.quantize(array, type_)
                writer.add_tensor(name, data, raw_dtype=type_)
                held[name] = torch.from_numpy(gguf.dequantize(data, type_))
            elif array.ndim == 2:
                data = gguf.quantize(array, gguf.GGMLQuantizationType.BF16)
                writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
                held[name] = torch.from_numpy(array).bfloat16().float()
            else:
                writer.add_tensor(name, array)
                held[name] = torch.from_numpy(array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def weights_of(flux: Flux) -> dict[str, Tensor]:
    """Weights as the layers act: their answers to the unit vectors, less the bias."""
    found = {}
    for name, layer in flux.named_modules():
        if isinstance(layer, Linear):
            unit = torch.eye(layer.shape[1])
            bias = 0 if layer.bias is None else layer.bias.float()
            found[f"{name}.weight"] = (layer(unit) - bias).T
    return found


@pytest.fixture
def component(small_models: Path, tmp_path: Path) -> tuple[Component, dict[str, Tensor]]:
    held = write(tmp_path / "flux.gguf", small_models / CHECKPOINT, "Q8_0")
    return TensorFile.open(tmp_path / "flux.gguf").component("flux"), held


@torch.inference_mode()
def test_a_transformer(small_models: Path, component: tuple[Component, dict[str, Tensor]]) -> None:
    """The small one cannot say its rope axes in a GGUF file, so they are given to it here."""
    file, held = component
    declared = {"axes": [8, 12, 12]}
    file = Component(file.file, file.kind, file.prefix, file.tensors, declared)
    library = ModelLibrary(replace(CPU32, budget=1))  # no room to widen all weights at once
    flux = library.flux(file, (), "default")
    for name, weight in weights_of(flux).items():
        assert torch.allclose(weight, held[name], atol=1e-5), name
    layer = flux.get_submodule("double_blocks.0.img_attn.qkv")
    assert isinstance(layer, Linear)
    assert layer.weight.dtype == torch.uint8  # held as in the file

    uso = TensorFile.open(small_models / "loras/uso-flux1-dit-lora-v1.safetensors").component("uso_lora")
    with_lora = weights_of(library.flux(file, (LoraUse(uso, 0.5),), "default"))
    name = "double_blocks.0.img_attn.proj"
    with safe_open(uso.file.path, framework="pt") as reader:
        stem = "double_blocks.0.processor.proj_lora1"
        up, down = (reader.get_tensor(f"{stem}.{side}.weight").float() for side in ("up", "down"))
    assert torch.allclose(with_lora[f"{name}.weight"], held[f"{name}.weight"] + 0.5 * up @ down, atol=1e-4)


def test_shapes_are_those_of_the_safetensors_file(
    small_models: Path, component: tuple[Component, dict[str, Tensor]]
) -> None:
    original = TensorFile.open(small_models / CHECKPOINT).component("flux")
    assert component[0].shapes == original.shapes


def test_a_format_that_is_not_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "flux")
    type_ = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("a", gguf.quantize(np.ones((2, 32), np.float32), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsoflowError, match="Q4_1") as caught:
        TensorFile.open(tmp_path / "odd.gguf")
    assert caught.value.code == "model_unsupported"


@pytest.mark.parametrize("length", [4, 30, 5000])
def test_a_truncated_file(
    component: tuple[Component, dict[str, Tensor]], tmp_path: Path, length: int
) -> None:
    (tmp_path / "cut.gguf").write_bytes(component[0].file.path.read_bytes()[:length])
    with pytest.raises(UsoflowError) as caught:
        TensorFile.open(tmp_path / "cut.gguf")
    assert caught.value.code == "model_damaged"


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsoflowError) as caught:
        TensorFile.open(tmp_path / "a.gguf")
    assert caught.value.code == "extra_missing"
    assert "pip install" in caught.value.remedy


def test_a_quantised_table_keeps_its_shape(tmp_path: Path) -> None:
    """Only a linear layer's matrix stays as bytes."""
    table = torch.randn(4, 32).numpy()
    data = gguf.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "flux")
    writer.add_tensor("weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for write_part in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write_part()
    writer.close()
    file = TensorFile.open(tmp_path / "t.gguf")
    embedding = Embedding(4, 32)
    assemble(Component(file, "t5", "", file.tensors, {}), embedding)
    wanted = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(embedding(torch.tensor([3, 1])), wanted[[3, 1]])

"""The USO LoRA: branches equal merged weights; the goldens' patched weights; what does not fit is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from untrained import FLUX, write_untrained
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_flux
from usoflow.models.lora import attach
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.placement import Placement
from usoflow.models.weights import Linear

CPU32 = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    write_untrained(models)
    return models


def flux_of(tree: Path) -> Component:
    return TensorFile.open(tree / "checkpoints/flux1-dev-fp8.safetensors").component("flux")


def lora_of(tree: Path) -> Component:
    return TensorFile.open(tree / "loras/uso-flux1-dit-lora-v1.safetensors").component("uso_lora")


def effective(layer: Linear) -> Tensor:
    """The weight that a layer acts as: its answer to the unit vectors."""
    unit = torch.eye(layer.weight.shape[1])
    bias = 0 if layer.bias is None else layer.bias.float()
    return (layer(unit) - bias).T


@torch.inference_mode()
def test_branches_act_as_merged_weights(tree: Path) -> None:
    """W' = W + strength * up @ down on the rows of q, k, v; the MLP's rows of linear1 stay."""
    plain, patched = load_flux(flux_of(tree)), load_flux(flux_of(tree))
    attach(patched, lora_of(tree), 0.5)
    from safetensors.torch import load_file

    tensors = {k: v.float() for k, v in load_file(lora_of(tree).file.path).items()}
    for layer, pair in {
        "double_blocks.1.img_attn.qkv": "double_blocks.1.processor.qkv_lora1",
        "double_blocks.0.img_attn.proj": "double_blocks.0.processor.proj_lora1",
        "double_blocks.0.txt_attn.qkv": "double_blocks.0.processor.qkv_lora2",
        "double_blocks.1.txt_attn.proj": "double_blocks.1.processor.proj_lora2",
        "single_blocks.1.linear1": "single_blocks.1.processor.qkv_lora",
        "single_blocks.0.linear2": "single_blocks.0.processor.proj_lora",
    }.items():
        base = plain.get_submodule(layer).weight.float()
        delta = torch.zeros_like(base)
        product = tensors[f"{pair}.up.weight"] @ tensors[f"{pair}.down.weight"]
        delta[: len(product)] = product
        found = effective(patched.get_submodule(layer))
        assert torch.allclose(found, base + 0.5 * delta, atol=1e-5), layer
        assert not torch.allclose(found, base, atol=1e-3), layer


@torch.inference_mode()
def test_handles_share_weights_and_do_not_disturb_each_other(tree: Path) -> None:
    library, use = ModelLibrary(CPU32), LoraUse(lora_of(tree), 1.0)
    base = library.flux(flux_of(tree), (), "default")
    patched = library.flux(flux_of(tree), (use, use), "default")
    name = "double_blocks.0.img_attn.qkv"
    assert patched.get_submodule(name).weight is base.get_submodule(name).weight
    assert not base.get_submodule(name).branches
    twice = effective(patched.get_submodule(name)) - effective(base.get_submodule(name))
    once = effective(library.flux(flux_of(tree), (use,), "default").get_submodule(name))
    assert torch.allclose(twice, 2 * (once - effective(base.get_submodule(name))), atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, -1.0])
@torch.inference_mode()
def test_strength_zero_and_negative(tree: Path, strength: float) -> None:
    plain, patched, added = (load_flux(flux_of(tree)) for _ in range(3))
    attach(patched, lora_of(tree), strength)
    attach(added, lora_of(tree), 1.0)
    name = "single_blocks.0.linear2"
    w, up, found = (effective(m.get_submodule(name)) for m in (plain, added, patched))
    assert torch.allclose(found, w + strength * (up - w), atol=1e-5)


def test_blocks_that_the_model_lacks_are_one_warning(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(lora_of(tree).file.path)
    extra = {k.replace("single_blocks.0", "single_blocks.37"): v.clone() for k, v in tensors.items()}
    save_file(tensors | extra, tmp_path / "deep.safetensors")
    lora = TensorFile.open(tmp_path / "deep.safetensors").component("uso_lora")
    with caplog.at_level(logging.WARNING):
        attach(load_flux(flux_of(tree)), lora, 1.0)
    assert [record.args[1:3] for record in caplog.records] == [(2, 14)]


@pytest.mark.parametrize("damage", ["absent", "shape", "unknown"])
def test_a_lora_that_does_not_fit_is_refused(tree: Path, tmp_path: Path, damage: str) -> None:
    width = {"absent": FLUX.hidden, "shape": FLUX.hidden - 2, "unknown": FLUX.hidden}[damage]
    number, part = {"absent": (30, "qkv_lora"), "shape": (0, "qkv_lora"), "unknown": (0, "ff_lora")}[damage]
    stem = f"single_blocks.{number}.processor.{part}"
    tensors = {f"{stem}.down.weight": torch.ones(2, width), f"{stem}.up.weight": torch.ones(3 * width, 2)}
    save_file(tensors, tmp_path / "odd.safetensors")
    lora = TensorFile.open(tmp_path / "odd.safetensors").component("uso_lora")
    with pytest.raises(UsoflowError) as caught:
        attach(load_flux(flux_of(tree)), lora, 1.0)
    assert caught.value.code == "lora_mismatch"


GOLDEN_LAYERS = (
    "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj",
    "single_blocks.0.linear2", "single_blocks.1.linear1",
)  # fmt: skip


def _patched(synth_models: Path, precision: str, strength: float) -> Flux:
    file = TensorFile.open(synth_models / f"checkpoints/flux1-dev-{precision}.safetensors")
    lora = TensorFile.open(synth_models / "loras/uso-flux1-dit-lora-v1.safetensors")
    model = load_flux(file.component("flux"))
    attach(model, lora.component("uso_lora"), strength)
    return model


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@torch.inference_mode()
def test_golden_patched_weights(synth_models: Path, golden, precision: str, strength: float) -> None:
    """The branches act as the reference's fp32 sums; its stochastic rounding to fp8 has no counterpart."""
    model = _patched(synth_models, precision, strength)
    for name in GOLDEN_LAYERS:
        weight = effective(model.get_submodule(name)).numpy()
        result = golden("lora").check(f"{precision}.s{strength}.{name}.weight", weight, 1e-4)
        assert result["ok"], result


@torch.inference_mode()
def test_golden_patched_weight(synth_models: Path, golden) -> None:
    """One of them in every run of the tests."""
    name = "double_blocks.0.txt_attn.proj"
    weight = effective(_patched(synth_models, "fp8", 1.0).get_submodule(name)).numpy()
    result = golden("lora").check(f"fp8.s1.0.{name}.weight", weight, 1e-4)
    assert result["ok"], result

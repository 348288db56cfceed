"""Loaders: which part of which file, from one file or several; handles that are never changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.nodes import conditioning, latent, loaders, sampling, uso
from usoflow.nodes.context import NodeContext
from usoflow.settings import find_folders

CHECKPOINT = "flux1-dev-fp8.safetensors"
LORA = "uso-flux1-dit-lora-v1.safetensors"
PARTS = {
    "diffusion_models/flux.safetensors": "model.diffusion_model.",
    "text_encoders/clip_l.safetensors": "text_encoders.clip_l.transformer.",
    "text_encoders/t5.safetensors": "text_encoders.t5xxl.transformer.",
    "vae/ae.safetensors": "vae.",
}


@pytest.fixture(scope="module")
def split_models(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint as split files, whose names have no prefix."""
    models = tmp_path_factory.mktemp("split")
    source = small_models / "checkpoints" / CHECKPOINT
    with safe_open(source, framework="pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(source)
    for file, prefix in PARTS.items():
        (models / file).parent.mkdir(exist_ok=True)
        part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        save_file(part, models / file, metadata=metadata)
    shutil.copytree(small_models / "loras", models / "loras")
    return models


@pytest.fixture
def split(context: NodeContext, split_models: Path) -> NodeContext:
    return replace(context, folders=find_folders(models=split_models))


@torch.inference_mode()
def picture(model: Any, clip: Any, vae: Any, context: NodeContext) -> Tensor:
    """A text-to-image run of one step."""
    text = conditioning.encode_text("a cat", clip, context=context)
    denoised = sampling.k_sampler(
        model,
        seed=3,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=text,
        negative=text,
        latent_image=latent.empty_sd3_latent(64, 64),
        context=context,
    )
    return latent.vae_decode(denoised, vae, context=context)


@contextmanager
def refused(code: str) -> Iterator[pytest.ExceptionInfo[UsoflowError]]:
    with pytest.raises(UsoflowError) as caught:
        yield caught
    assert caught.value.code == code


def test_split_files_give_the_picture_of_the_checkpoint(context: NodeContext, split: NodeContext) -> None:
    whole = picture(*loaders.load_checkpoint(CHECKPOINT, context=context), context)
    model = loaders.load_diffusion_model("flux.safetensors", "default", context=split)
    vae = loaders.load_vae("ae.safetensors", context=split)
    for names in (("clip_l.safetensors", "t5.safetensors"), ("t5.safetensors", "clip_l.safetensors")):
        clip = loaders.load_text_encoders(*names, "flux", context=split)
        assert torch.equal(picture(model, clip, vae, split), whole)


def test_weight_dtype(split: NodeContext) -> None:
    """fp8 is coarser, not other; the `_fast` of other back ends is the same here."""
    clip = loaders.load_text_encoders("clip_l.safetensors", "t5.safetensors", "flux", context=split)
    vae = loaders.load_vae("ae.safetensors", context=split)
    stored, narrow, fast = (
        picture(loaders.load_diffusion_model("flux.safetensors", dtype, context=split), clip, vae, split)
        for dtype in ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast")
    )
    assert torch.equal(narrow, fast)
    assert 0 < float((stored - narrow).abs().mean()) < 0.1


def test_loading_reads_no_weights(context: NodeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only headers: a loader that nothing follows costs nothing."""

    def fail(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("usoflow.models.weights.read_tensors", fail)
    monkeypatch.setattr("usoflow.models.lora.read_tensors", fail)
    model, _, _ = loaders.load_checkpoint(CHECKPOINT, context=context)
    loaders.load_lora_model_only(model, LORA, 1.0, context=context)
    loaders.load_clip_vision("sigclip_vision_patch14_384.safetensors", context=context)
    loaders.load_model_patch("uso-flux1-projector-v1.safetensors", context=context)


def test_parts_that_a_file_lacks(context: NodeContext, split: NodeContext) -> None:
    with refused("model_kind") as caught:
        loaders.load_text_encoders("t5.safetensors", "t5.safetensors", "flux", context=split)
    assert "holds no CLIP-L text encoder; it holds T5 text encoder" in caught.value.detail
    folder = split.folders.models["checkpoints"][0]
    folder.mkdir(exist_ok=True)
    shutil.copy(split.folders.model("diffusion_models", "flux.safetensors"), folder)
    with refused("model_kind") as caught:
        loaders.load_checkpoint("flux.safetensors", context=split)
    assert "holds only FLUX.1 transformer" in caught.value.detail
    assert "UNETLoader" in caught.value.remedy
    with refused("model_missing"):
        loaders.load_vae("none.safetensors", context=split)
    with refused("path_outside"):
        loaders.load_vae("../vae/ae.safetensors", context=split)
    shutil.copy(
        split.folders.model("vae", "ae.safetensors"), split.folders.models["loras"][0] / "vae.safetensors"
    )
    model, _, _ = loaders.load_checkpoint(CHECKPOINT, context=context)
    with refused("model_kind"):
        loaders.load_lora_model_only(model, "vae.safetensors", 1.0, context=split)


def test_loras_add_up_and_leave_the_model_as_it_was(context: NodeContext) -> None:
    model, clip, vae = loaders.load_checkpoint(CHECKPOINT, context=context)

    def with_loras(*strengths: float) -> Tensor:
        handle = model
        for strength in strengths:
            handle = loaders.load_lora_model_only(handle, LORA, strength, context=context)
        return picture(handle, clip, vae, context)

    plain = with_loras()
    assert torch.equal(with_loras(0.0), plain)
    assert not torch.allclose(with_loras(1.0), plain, atol=1e-2)
    assert torch.allclose(with_loras(0.5, 0.5), with_loras(1.0), atol=1e-4)
    assert torch.allclose(with_loras(1.0, -1.0), plain, atol=1e-4)
    assert torch.equal(with_loras(), plain)


@torch.inference_mode()
def test_styles_leave_the_model_as_it_was(context: NodeContext) -> None:
    model, clip, vae = loaders.load_checkpoint(CHECKPOINT, context=context)
    tower = loaders.load_clip_vision("sigclip_vision_patch14_384.safetensors", context=context)
    patch = loaders.load_model_patch("uso-flux1-projector-v1.safetensors", context=context)
    seen = conditioning.encode_vision(tower, torch.rand(1, 32, 32, 3), "center", context=context)
    before = picture(model, clip, vae, context)
    one = uso.style_reference(model, patch, seen)
    two = uso.style_reference(one, patch, seen)
    assert (len(model.styles), len(one.styles), len(two.styles)) == (0, 1, 2)
    assert not torch.allclose(picture(one, clip, vae, context), before, atol=1e-2)
    assert torch.equal(picture(model, clip, vae, context), before)
    with pytest.raises(FrozenInstanceError):
        model.styles = one.styles


@torch.inference_mode()
def test_styles_of_a_projector_for_another_transformer_are_refused(
    context: NodeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands before it in the chain."""
    model, clip, vae = loaders.load_checkpoint(CHECKPOINT, context=context)
    tower = loaders.load_clip_vision("sigclip_vision_patch14_384.safetensors", context=context)
    patch = loaders.load_model_patch("uso-flux1-projector-v1.safetensors", context=context)
    seen = conditioning.encode_vision(tower, torch.rand(1, 32, 32, 3), "center", context=context)
    styled = uso.style_reference(uso.style_reference(model, patch, seen), patch, seen)
    widths = iter([128, 256])
    monkeypatch.setattr(context.library, "style_tokens", lambda *_: torch.zeros(1, 6, next(widths)))
    with refused("models_mismatch") as caught:
        picture(styled, clip, vae, context)
    assert "style projector gives vectors of 256" in caught.value.detail


def test_both_text_encoders_from_one_file(
    context: NodeContext, split: NodeContext, small_models: Path
) -> None:
    """As DualCLIPLoader gives them from two; a file with one of them names the node that takes two."""
    folder = split.folders.models["text_encoders"][0]
    shutil.copy(small_models / "checkpoints" / CHECKPOINT, folder / "both.safetensors")
    clip = loaders.load_text_encoders_of_one_file("both.safetensors", "sd3", context=split)
    (one, _), *_ = conditioning.encode_text("a cat", clip, context=context)
    pair = loaders.load_text_encoders("clip_l.safetensors", "t5.safetensors", "flux", context=split)
    (two, _), *_ = conditioning.encode_text("a cat", pair, context=context)
    assert torch.equal(one, two)
    (folder / "both.safetensors").unlink()
    with refused("model_kind") as caught:
        loaders.load_text_encoders_of_one_file("t5.safetensors", "sd3", context=split)
    assert "DualCLIPLoader" in caught.value.remedy


def test_a_lora_for_model_and_text_encoder(context: NodeContext, split: NodeContext) -> None:
    """Each strength is for its own part; zero is as without."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "lora_unet_double_blocks_0_img_mlp_0": (512, 128),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (64, 32),
    }
    tensors = {}
    for stem, (rows, columns) in sizes.items():
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, split.folders.models["loras"][0] / "kohya.safetensors")
    model, clip, vae = loaders.load_checkpoint(CHECKPOINT, context=context)
    plain = picture(model, clip, vae, context)
    pictures = {
        strengths: picture(
            *loaders.load_lora(model, clip, "kohya.safetensors", *strengths, context=split), vae, context
        )
        for strengths in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    }
    assert torch.allclose(pictures[0.0, 0.0], plain, atol=1e-6)
    assert not torch.allclose(pictures[1.0, 0.0], plain, atol=1e-3)
    assert not torch.allclose(pictures[0.0, 1.0], plain, atol=1e-3)
    assert not torch.allclose(pictures[1.0, 0.0], pictures[0.0, 1.0], atol=1e-3)

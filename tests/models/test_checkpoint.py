"""Headers: what a file holds, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import CONFIG_KEY, TensorFile
from usoflow.models.clip import ClipTextConfig
from usoflow.models.flux_config import FluxConfig
from usoflow.models.style_projector import StyleProjectorConfig
from usoflow.models.t5 import T5Config
from usoflow.models.vae import VaeConfig
from usoflow.models.vision import SiglipConfig

BIAS = "relative_attention_bias"
FLUX_KEY = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def code_of(path: Path) -> str:
    with pytest.raises(UsoflowError) as caught:
        TensorFile.open(path).components()
    assert path.name in caught.value.detail
    return caught.value.code


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_components_of_an_all_in_one_file(synth_models: Path) -> None:
    file = TensorFile.open(synth_models / "checkpoints/flux1-dev-fp8.safetensors")
    found = {kind: (c.prefix, len(c.tensors)) for kind, c in file.components().items()}
    assert found == {
        "flux": ("model.diffusion_model.", 60),
        "clip_l": ("text_encoders.clip_l.transformer.", 197),
        "t5": ("text_encoders.t5xxl.transformer.", 12),
        "vae": ("vae.", 244),
    }
    assert file.component("flux").tensors["img_in.weight"].dtype == "F8_E4M3"


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("loras", "uso_lora"), ("model_patches", "uso_projector"), ("clip_vision", "siglip")],
)
def test_single_components(synth_models: Path, folder: str, kind: str) -> None:
    (path,) = (synth_models / folder).glob("*.safetensors")
    assert list(TensorFile.open(path).components()) == [kind]


def test_declared_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({FLUX_KEY: torch.ones(1)}, path, metadata={CONFIG_KEY: json.dumps({"flux": {"theta": 7}})})
    assert TensorFile.open(path).component("flux").declared == {"theta": 7}


@pytest.mark.parametrize("config", ["{", "[]", '{"flux": 3}'])
def test_broken_configuration(tmp_path: Path, config: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({FLUX_KEY: torch.ones(1)}, path, metadata={CONFIG_KEY: config})
    assert code_of(path) == "model_damaged"


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, path)
    before = TensorFile.open(path)
    assert TensorFile.open(path) is before
    save_file({"b": torch.ones(2)}, path)
    assert list(TensorFile.open(path).tensors) == ["b"]
    assert TensorFile.open(path).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("header", "data", "length", "code"),
    [
        ({"a": entry()}, b"1234567", None, "model_truncated"),
        (b"{}", b"", 1000, "model_truncated"),
        (b"{}", b"", 2**62, "model_damaged"),
        (b"not json", b"", None, "model_damaged"),
        ([], b"", None, "model_damaged"),
        ({"a": 3}, b"", None, "model_damaged"),
        ({"a": entry(dtype="F8_E8M0")}, b"12345678", None, "model_unsupported"),
        ({"a": entry(dtype=3)}, b"12345678", None, "model_damaged"),  # type: ignore[arg-type]
        ({"a": entry(shape=(3,))}, b"12345678", None, "model_damaged"),
        ({"a": entry(shape=(-1, -2))}, b"12345678", None, "model_damaged"),
        ({"a": entry(offsets=(8, 0))}, b"12345678", None, "model_damaged"),
        ({"a": entry(offsets=(-8, 0))}, b"12345678", None, "model_damaged"),
        ({"__metadata__": 3}, b"", None, "model_damaged"),
    ],
)
def test_damaged_files(tmp_path: Path, header: object, data: bytes, length: int | None, code: str) -> None:
    assert code_of(written(tmp_path / "bad.safetensors", header, data, length)) == code


@pytest.mark.parametrize("start", [b"PK\x03\x04xxxxxxxxxx", b"\x80\x02}q\x00xxxxxxx"])
def test_pickles_are_refused(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(start)
    assert code_of(path) == "model_pickle"


@pytest.mark.parametrize("length", [60, 316, 15392, 80928])
def test_a_length_that_looks_like_a_web_page_is_a_length(tmp_path: Path, length: int) -> None:
    """60 is "<"; 15392 begins with a blank and then it."""
    header = json.dumps({"a": entry()}, separators=(",", ":"))
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length).encode() + bytes(8))
    assert list(TensorFile.open(path).tensors) == ["a"]


def test_empty_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    assert code_of(tmp_path / "empty.safetensors") == "model_truncated"
    assert code_of(tmp_path / "absent.safetensors") == "model_missing"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "any.safetensors"
    path.write_bytes(data)
    try:
        TensorFile.open(path).components()
    except UsoflowError:
        pass
    finally:
        os.unlink(path)


def test_tensors_of_no_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({FLUX_KEY: torch.ones(1), "first_stage_model.x": torch.ones(1)}, path)
    assert code_of(path) == "tensor_unknown"


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sd15.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, path)
    with pytest.raises(UsoflowError, match=r"holds no FLUX\.1 transformer; it holds nothing") as caught:
        TensorFile.open(path).component("flux")
    assert caught.value.code == "model_kind"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("flux", "transformer_blocks.0.attn.to_q.weight"),
        ("flux", "single_transformer_blocks.37.norm.linear.bias"),
        ("vae", "decoder.up_blocks.0.resnets.0.conv1.weight"),
    ],
)
def test_the_layout_of_diffusers_is_named(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.ones(1), "decoder.conv_in.weight": torch.ones(1)}, path)
    with pytest.raises(UsoflowError, match="layout of diffusers") as caught:
        TensorFile.open(path).component(kind)
    assert caught.value.code == "model_kind"
    assert "flux1-dev.safetensors" in caught.value.remedy


def test_a_gap_in_block_numbers(tmp_path: Path) -> None:
    path = tmp_path / "gap.safetensors"
    keys = [FLUX_KEY, FLUX_KEY.replace(".0.", ".2.")]
    save_file({key: torch.ones(1) for key in keys}, path)
    with pytest.raises(UsoflowError, match=r"double_blocks\.1\.") as caught:
        TensorFile.open(path).component("flux").count("double_blocks.{}.")
    assert caught.value.code == "block_gap"


def test_a_number_beyond_all_blocks_is_a_gap_too(tmp_path: Path) -> None:
    """Found without counting up to it."""
    path, far = tmp_path / "far.safetensors", "double_blocks.99999999999."
    save_file({key: torch.ones(1) for key in (FLUX_KEY, FLUX_KEY.replace("double_blocks.0.", far))}, path)
    with pytest.raises(UsoflowError, match=r"9\.\* but no double_blocks\.1\.") as caught:
        TensorFile.open(path).component("flux").count("double_blocks.{}.")
    assert caught.value.code == "block_gap"


def test_a_number_that_python_does_not_read_is_none(tmp_path: Path) -> None:
    """It refuses to convert more than 4300 digits."""
    path, far = tmp_path / "digits.safetensors", f".{'1' * 5000}."
    save_file({key: torch.ones(1) for key in (FLUX_KEY, FLUX_KEY.replace(".0.", far))}, path)
    assert TensorFile.open(path).component("flux").count("double_blocks.{}.") == 1


CONFIGS = {
    "flux": FluxConfig,
    "clip_l": ClipTextConfig,
    "t5": T5Config,
    "vae": VaeConfig,
    "siglip": SiglipConfig,
    "uso_projector": StyleProjectorConfig,
}
SHAPES = ((), (0,), (3,), (0, 0), (1, 1), (1, 1, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1, 1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_tensors_of_any_shape_are_sizes_or_an_error(small_models: Path, kind: str) -> None:
    """Of more or fewer sides than the model's, or with none of anything: named, and no defect of ours."""
    files = map(TensorFile.open, small_models.rglob("*.safetensors"))
    (part,) = (file.components()[kind] for file in files if kind in file.components())
    codes = set()
    for name, info in part.tensors.items():
        for shape in SHAPES:
            changed = {**part.tensors, name: replace(info, shape=shape)}
            try:
                CONFIGS[kind].from_component(replace(part, tensors=changed))
            except UsoflowError as error:
                codes.add(error.code)
    assert "tensor_shape" in codes


@pytest.mark.parametrize(
    ("kind", "names", "words"),
    [
        ("vae", ("decoder.conv_in.weight", "quant_conv.weight"), "VAE of another family"),
        (
            "t5",
            tuple(f"encoder.block.{i}.layer.0.SelfAttention.{n}.weight" for i in (0, 1) for n in ("q", BIAS)),
            "umT5",
        ),
        (
            "siglip",
            ("vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.class_embedding"),
            "CLIP's vision tower",
        ),
    ],
)
def test_models_of_other_families_are_told_apart(
    tmp_path: Path, kind: str, names: tuple[str, ...], words: str
) -> None:
    """They have all that a model of FLUX.1 or USO is recognised by."""
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(1) for name in names[:-1]}, path)
    assert kind in TensorFile.open(path).components()
    path = tmp_path / "b.safetensors"
    save_file({name: torch.ones(1) for name in names}, path)
    assert kind not in TensorFile.open(path).components()
    with pytest.raises(UsoflowError, match=words) as caught:
        TensorFile.open(path).component(kind)
    assert caught.value.code == "model_kind"


def test_a_lora_with_the_names_of_diffusers_is_a_lora(tmp_path: Path) -> None:
    save_file(
        {f"single_transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(1) for side in "AB"},
        tmp_path / "a.safetensors",
    )
    assert TensorFile.open(tmp_path / "a.safetensors").component("lora").kind == "lora"


def test_one_part_of_several_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file(
        {f"encoder.block.0.layer.0.SelfAttention.{n}.weight": torch.ones(1, 1) for n in ("q", BIAS)}, path
    )
    with pytest.raises(UsoflowError, match=r"lacks the tensor shared\.weight") as caught:
        T5Config.from_component(TensorFile.open(path).component("t5"))
    assert "one part of several" in caught.value.remedy

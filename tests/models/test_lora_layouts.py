"""LoRA files of other trainers: branches against weights merged here, from the layouts' own documentation.

The merging is written out per layout with diffusers' conversion of FLUX in mind: q, k and v of
`to_q, to_k, to_v` are rows of `qkv` (or, in single blocks, of `linear1`, before the MLP's).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from untrained import FLUX
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_flux
from usoflow.models.lora import attach
from usoflow.models.lora_layouts import LoraUse, pairs_for, refuse_other_methods
from usoflow.models.placement import Placement
from usoflow.models.weights import Linear

W, M, RANK = FLUX.hidden, FLUX.mlp_dim, 3
CPU32 = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture
def checkpoint(small_models: Path) -> TensorFile:
    return TensorFile.open(small_models / "checkpoints/flux1-dev-fp8.safetensors")


def pair(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """down [rank, columns], up [rows, rank]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(RANK, columns, generator=generator) / columns**0.5,
        torch.randn(rows, RANK, generator=generator),
    )


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Component:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "l.safetensors", metadata)
    return TensorFile.open(folder / "l.safetensors").component("lora")


def change(checkpoint: TensorFile, lora: Component, layer: str, strength: float = 1.0) -> Tensor:
    """What the LoRA adds to a layer's weight: the answer to unit vectors, with it less without."""
    plain, patched = (load_flux(checkpoint.component("flux")) for _ in range(2))
    attach(patched, lora, strength)

    def weight(flux: Flux) -> Tensor:
        part = flux.get_submodule(layer)
        assert isinstance(part, Linear)
        with torch.no_grad():
            return part(torch.eye(part.weight.shape[1])).T

    return weight(patched) - weight(plain)


@pytest.mark.parametrize("strength", [1.0, -0.5, 0.3])
@pytest.mark.parametrize(
    ("name", "layer", "rows", "columns"),
    [
        ("lora_unet_double_blocks_1_img_attn_qkv", "double_blocks.1.img_attn.qkv", 3 * W, W),
        ("lora_unet_double_blocks_0_txt_mlp_2", "double_blocks.0.txt_mlp.2", W, M),
        ("lora_unet_single_blocks_1_linear1", "single_blocks.1.linear1", 3 * W + M, W),
        ("lora_unet_single_blocks_0_modulation_lin", "single_blocks.0.modulation.lin", 3 * W, W),
        ("lora_unet_final_layer_linear", "final_layer.linear", 64, W),
    ],
)
def test_kohya(
    checkpoint: TensorFile, tmp_path: Path, name: str, layer: str, rows: int, columns: int, strength: float
) -> None:
    """W' = W + strength * alpha / rank * up @ down."""
    down, up = pair(rows, columns, 0)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(6.0),
    }
    found = change(checkpoint, saved(tmp_path, tensors), layer, strength)
    assert torch.allclose(found, strength * 6.0 / RANK * up @ down, atol=1e-4)


DIFFUSERS = [
    ("transformer_blocks.1.attn.to_q", "double_blocks.1.img_attn.qkv", slice(0, W), W),
    ("transformer_blocks.1.attn.to_k", "double_blocks.1.img_attn.qkv", slice(W, 2 * W), W),
    ("transformer_blocks.0.attn.add_v_proj", "double_blocks.0.txt_attn.qkv", slice(2 * W, 3 * W), W),
    ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj", slice(0, W), W),
    ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", slice(0, W), W),
    ("transformer_blocks.0.ff.net.0.proj", "double_blocks.0.img_mlp.0", slice(0, M), W),
    ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2", slice(0, W), M),
    ("transformer_blocks.0.norm1_context.linear", "double_blocks.0.txt_mod.lin", slice(0, 6 * W), W),
    ("single_transformer_blocks.1.attn.to_v", "single_blocks.1.linear1", slice(2 * W, 3 * W), W),
    ("single_transformer_blocks.1.proj_mlp", "single_blocks.1.linear1", slice(3 * W, 3 * W + M), W),
    ("single_transformer_blocks.0.proj_out", "single_blocks.0.linear2", slice(0, W), W + M),
    ("single_transformer_blocks.0.norm.linear", "single_blocks.0.modulation.lin", slice(0, 3 * W), W),
    ("context_embedder", "txt_in", slice(0, W), FLUX.text_dim),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", slice(0, W), FLUX.pooled_dim),
]


@pytest.mark.parametrize(("name", "layer", "rows", "columns"), DIFFUSERS, ids=[d[0] for d in DIFFUSERS])
def test_diffusers(
    checkpoint: TensorFile, tmp_path: Path, name: str, layer: str, rows: slice, columns: int
) -> None:
    down, up = pair(rows.stop - rows.start, columns, 1)
    tensors = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    found = change(checkpoint, saved(tmp_path, tensors), layer)
    expected = torch.zeros_like(found)
    expected[rows] = up @ down
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_last_modulation_has_its_halves_the_other_way_round(
    checkpoint: TensorFile, tmp_path: Path
) -> None:
    """diffusers' `norm_out` gives scale and shift, FLUX's own `adaLN_modulation` shift and scale."""
    down, up = pair(2 * W, W, 1)
    name = "transformer.norm_out.linear"
    found = change(
        checkpoint,
        saved(tmp_path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}),
        "final_layer.adaLN_modulation.1",
    )
    assert torch.allclose(found, torch.cat([up[W:], up[:W]]) @ down, atol=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        "diffusion_model.{}.lora_A.weight",
        "base_model.model.{}.lora_A.default.weight",
        "transformer.{}.lora.down.weight",
        "base_model.model.diffusion_model.{}.lora_A.weight",
        "lycoris_{}.lora_down.weight",
    ],
)
def test_prefixes_and_names_of_the_two_sides(checkpoint: TensorFile, tmp_path: Path, form: str) -> None:
    down, up = pair(3 * W, W, 2)
    layer = "double_blocks.0.img_attn.qkv"
    name = form.format(layer.replace(".", "_") if form.startswith("lycoris_") else layer)
    other = name.replace("lora_A", "lora_B").replace("down", "up")
    lora = saved(tmp_path, {name: down, other: up})
    assert torch.allclose(change(checkpoint, lora, "double_blocks.0.img_attn.qkv"), up @ down, atol=1e-4)


def test_the_scale_that_peft_declares(checkpoint: TensorFile, tmp_path: Path) -> None:
    down, up = pair(3 * W, W, 2)
    stem = "transformer.double_blocks.0.img_attn.qkv"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    declared = {
        "lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK})
    }
    found = change(checkpoint, saved(tmp_path, tensors, declared), "double_blocks.0.img_attn.qkv")
    assert torch.allclose(found, 2 * up @ down, atol=1e-4)


@pytest.mark.parametrize(
    ("declared", "factor"),
    [
        ({"r": 64, "lora_alpha": 6}, 6 / RANK),  # the rank is the pair's own: peft's rank_pattern
        ({"lora_alpha": 6, "alpha_pattern": {"img_attn.qkv": 12}}, 12 / RANK),
        ({"lora_alpha": 6, "alpha_pattern": {"txt_attn.qkv": 12}}, 6 / RANK),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({}, 1.0),
    ],
)
def test_scales_of_peft_by_pair(
    checkpoint: TensorFile, tmp_path: Path, declared: dict[str, object], factor: float
) -> None:
    down, up = pair(3 * W, W, 2)
    stem = "transformer.double_blocks.0.img_attn.qkv"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    text = json.dumps({f"transformer.{name}": value for name, value in declared.items()})
    lora = saved(tmp_path, tensors, {"lora_adapter_metadata": text})
    found = change(checkpoint, lora, "double_blocks.0.img_attn.qkv")
    assert torch.allclose(found, factor * up @ down, atol=1e-4)


def test_a_lora_for_text_encoders_only(
    checkpoint: TensorFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down, up = pair(8, 8, 2)
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    lora = saved(tmp_path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    attach(load_flux(checkpoint.component("flux")), lora, 1.0)
    assert "nothing for the transformer" in caplog.text


def test_a_strength_of_zero_reads_nothing(checkpoint: TensorFile, tmp_path: Path) -> None:
    lora = saved(tmp_path, {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 2)})
    library = ModelLibrary(CPU32)
    plain = library.flux(checkpoint.component("flux"), (), "default")
    assert library.flux(checkpoint.component("flux"), (LoraUse(lora, 0.0),), "default") is plain


def test_stacked_with_usos_own(checkpoint: TensorFile, small_models: Path, tmp_path: Path) -> None:
    """Each adds its part, whatever the order."""
    down, up = pair(3 * W, W, 3)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    kohya = saved(tmp_path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    uso = TensorFile.open(small_models / "loras/uso-flux1-dit-lora-v1.safetensors").component("uso_lora")
    layer = "double_blocks.0.img_attn.qkv"
    flux = load_flux(checkpoint.component("flux"))
    attach(flux, uso, 0.7)
    attach(flux, kohya, -0.4)
    plain = load_flux(checkpoint.component("flux"))
    with torch.no_grad():
        unit = torch.eye(W)
        both = (flux.get_submodule(layer)(unit) - plain.get_submodule(layer)(unit)).T
    assert torch.allclose(both, change(checkpoint, uso, layer, 0.7) - 0.4 * up @ down, atol=1e-4)


def test_text_encoders(checkpoint: TensorFile, tmp_path: Path) -> None:
    """CLIP's part changes the pooled state, T5's the tokens; the transformer's alone neither."""
    clip_stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    t5_stem = "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo"
    flux_stem = "lora_unet_double_blocks_0_img_attn_qkv"
    sizes = {clip_stem: (64, 32), t5_stem: (64, 128), flux_stem: (3 * W, W)}
    library = ModelLibrary(CPU32)
    clip_l, t5 = checkpoint.component("clip_l"), checkpoint.component("t5")
    plain = library.encode_text(clip_l, t5, "a cat")
    for stem, (rows, columns) in sizes.items():
        down, up = pair(rows, columns, 4)
        (tmp_path / stem).mkdir()
        lora = saved(tmp_path / stem, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
        changed = library.encode_text(clip_l, t5, "a cat", loras=(LoraUse(lora, 1.0),))
        assert torch.equal(changed.pooled, plain.pooled) == (stem != clip_stem)
        assert torch.equal(changed.context, plain.context) == (stem != t5_stem)
        kept = len(library._encodings)
        none = library.encode_text(clip_l, t5, "a cat", loras=(LoraUse(lora, 0.0),))
        assert torch.equal(none.context, plain.context)
        assert len(library._encodings) == kept, "what changes nothing is not encoded again"
    assert kept == 3  # without, for CLIP, for T5
    assert torch.equal(library.encode_text(clip_l, t5, "a cat").pooled, plain.pooled)


def test_layers_that_the_model_lacks_are_one_warning(
    checkpoint: TensorFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down, up = pair(3 * W, W, 0)
    tensors = {}
    for number in (0, 17):
        stem = f"lora_unet_double_blocks_{number}_img_attn_qkv"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    with caplog.at_level(logging.WARNING):
        attach(load_flux(checkpoint.component("flux")), saved(tmp_path, tensors), 1.0)
    assert [record.args[1:3] for record in caplog.records] == [(1, 2)]


@pytest.mark.parametrize(
    "again",
    [
        "lora_transformer_transformer_blocks_1_attn_to_out_0.lora_{}.weight",
        "transformer.transformer_blocks.1.attn.to_out.0.lora_{}.weight",
    ],
)
def test_what_is_there_by_two_names_is_applied_once(
    checkpoint: TensorFile, tmp_path: Path, caplog: pytest.LogCaptureFixture, again: str
) -> None:
    """As in huggingface/diffusers, pull request 10532."""
    down, up = pair(W, W, 0)
    names = ["lora_unet_double_blocks_1_img_attn_proj.lora_{}.weight", again]
    tensors = {name.format("down"): down for name in names} | {name.format("up"): up for name in names}
    found = change(checkpoint, saved(tmp_path, tensors), "double_blocks.1.img_attn.proj")
    assert torch.allclose(found, up @ down, atol=1e-4)
    assert "1 pairs are left out" in caplog.text


def test_of_two_names_diffusers_own_are_taken_and_other_rows_are_kept(
    checkpoint: TensorFile, tmp_path: Path
) -> None:
    (down, up), (all_down, all_up), (out_down, out_up) = pair(W, W, 0), pair(3 * W, W, 1), pair(W, W, 2)
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": down,
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": up,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": all_down,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": all_up,
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": out_down,
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": out_up,
    }
    lora = saved(tmp_path, tensors)
    qkv = change(checkpoint, lora, "double_blocks.0.img_attn.qkv")
    assert torch.allclose(qkv[:W], up @ down, atol=1e-4)
    assert not qkv[W:].any()
    assert torch.allclose(
        change(checkpoint, lora, "double_blocks.0.img_attn.proj"), out_up @ out_down, atol=1e-4
    )


def test_tensors_that_are_no_pair_are_one_warning(
    checkpoint: TensorFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Merges and other trainers' files have biases, norms and embeddings besides."""
    down, up = pair(W, W, 0)
    stem = "diffusion_model.double_blocks.1.img_attn.proj"
    tensors = {
        f"{stem}.lora_A.weight": down,
        f"{stem}.lora_B.weight": up,
        f"{stem}.diff_b": torch.zeros(W),
        "bundle_emb.word.clip_l": torch.zeros(1, 4),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.diff": torch.zeros(4),
    }
    found = change(checkpoint, saved(tmp_path, tensors), "double_blocks.1.img_attn.proj")
    assert torch.allclose(found, up @ down, atol=1e-4)
    assert [record.args[1] for record in caplog.records] == [3]


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",), "tensor_missing"),
        (("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"), "lora_mismatch"),  # nothing fits
        (("lora_unet_x.lora_down.weight", "lora_unet_x.odd"), "tensor_missing"),
    ],
)
def test_what_is_no_lora_of_flux_is_refused(
    checkpoint: TensorFile, tmp_path: Path, names: tuple[str, ...], code: str
) -> None:
    lora = saved(tmp_path, {name: torch.ones(3, 3) for name in names})
    with pytest.raises(UsoflowError) as caught:
        attach(load_flux(checkpoint.component("flux")), lora, 1.0)
    assert caught.value.code == code


def test_a_lora_of_another_width_is_refused(checkpoint: TensorFile, tmp_path: Path) -> None:
    down, up = pair(3 * W, W + 8, 0)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    lora = saved(tmp_path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    with pytest.raises(UsoflowError, match="img_attn_qkv is"):
        attach(load_flux(checkpoint.component("flux")), lora, 1.0)


L = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("DoRA", (f"{L}.lora_down.weight", f"{L}.lora_up.weight", f"{L}.dora_scale")),
        ("DoRA", ("transformer.x.lora_A.weight", "transformer.x.lora_B.weight",
                  "transformer.x.lora_magnitude_vector")),
        ("LoHa", tuple(f"{L}.hada_w{i}_{side}" for i in (1, 2) for side in "ab")),
        ("LoKr", (f"{L}.lokr_w1", f"{L}.lokr_w2_a", f"{L}.lokr_w2_b", f"{L}.alpha")),
        ("OFT", (f"{L}.oft_blocks", f"{L}.alpha")),
        ("Tucker", (f"{L}.lora_down.weight", f"{L}.lora_up.weight", f"{L}.lora_mid.weight")),
    ],
)  # fmt: skip
def test_other_methods_are_named(
    checkpoint: TensorFile, tmp_path: Path, method: str, names: tuple[str, ...]
) -> None:
    """Names as LyCORIS and PEFT write them; before the transformer is even loaded, too."""
    lora = saved(tmp_path, {name: torch.ones(2, 2) for name in names})
    for refuse in (
        lambda: attach(load_flux(checkpoint.component("flux")), lora, 1.0),
        lambda: refuse_other_methods(lora),
    ):
        with pytest.raises(UsoflowError, match=method) as caught:
            refuse()
        assert caught.value.code == "model_unsupported"


@pytest.mark.parametrize(("ending", "factor"), [("img_attn", 6 / RANK), ("img_attn.qkv", 12 / RANK)])
def test_a_pattern_is_for_names_that_end_so(
    checkpoint: TensorFile, tmp_path: Path, ending: str, factor: float
) -> None:
    down, up = pair(3 * W, W, 2)
    stem = "transformer.double_blocks.0.img_attn.qkv"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    declared = {"transformer.lora_alpha": 6, "transformer.alpha_pattern": {ending: 12}}
    lora = saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(declared)})
    found = change(checkpoint, lora, "double_blocks.0.img_attn.qkv")
    assert torch.allclose(found, factor * up @ down, atol=1e-4)


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_"])
def test_both_numbers_of_t5(tmp_path: Path, prefix: str) -> None:
    down, up = pair(8, 8, 2)
    stem = f"{prefix}encoder_block_0_layer_0_SelfAttention_q"
    lora = saved(tmp_path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    layers = {"encoder.block.0.layer.0.SelfAttention.q": (8, 8)}
    assert [found.layer for found in pairs_for(lora, "t5", layers).fitting] == list(layers)
    assert not pairs_for(lora, "flux", layers).total


def test_sides_of_different_ranks_are_refused(checkpoint: TensorFile, tmp_path: Path) -> None:
    down, up = pair(3 * W, W, 2)
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    lora = saved(tmp_path, {f"{stem}.lora_down.weight": down[1:], f"{stem}.lora_up.weight": up})
    with pytest.raises(UsoflowError) as caught:
        attach(load_flux(checkpoint.component("flux")), lora, 1.0)
    assert caught.value.code == "lora_mismatch"


@pytest.mark.parametrize(
    ("rank", "alpha"), [(0, torch.tensor(1.0)), (RANK, torch.ones(2)), (RANK, torch.ones(0))]
)
def test_ranks_of_none_and_alphas_of_several_are_refused(
    checkpoint: TensorFile, tmp_path: Path, rank: int, alpha: Tensor
) -> None:
    sides = {"lora_down.weight": torch.ones(rank, W), "lora_up.weight": torch.ones(3 * W, rank)}
    tensors = {f"{L}.{name}": tensor for name, tensor in (sides | {"alpha": alpha}).items()}
    with pytest.raises(UsoflowError, match=L) as caught:
        attach(load_flux(checkpoint.component("flux")), saved(tmp_path, tensors), 1.0)
    assert caught.value.code == "lora_mismatch"

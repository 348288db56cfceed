"""The style projector against its formula in plain torch, and against the golden."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from usoflow.models.checkpoint import TensorFile
from usoflow.models.loading import load_projector
from usoflow.models.style_projector import StyleProjector, StyleProjectorConfig

CONFIG = StyleProjectorConfig(patches=9, style_tokens=4, vision_dim=6, hidden=10)


def test_formula_and_order() -> None:
    """transpose, linear over patches, SiLU, transpose, layer norm, linear: high, then mid, then low."""
    torch.manual_seed(0)
    projector = StyleProjector(CONFIG)
    for parameter in projector.parameters():
        parameter.data = torch.randn(parameter.shape)
    states = {layer: torch.randn(2, 9, 6) for layer in (-20, -11, -2)}
    weights = projector.state_dict()
    expected = []
    for level, layer in (("high", -2), ("mid", -11), ("low", -20)):
        p = f"feature_embedder.{level}_"
        mixed = torch.einsum("sp,bpd->bsd", weights[p + "embedding_linear.0.weight"], states[layer])
        mixed = F.silu(mixed + weights[p + "embedding_linear.0.bias"][None, :, None])
        mixed = (mixed - mixed.mean(-1, keepdim=True)) / (
            mixed.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        mixed = mixed * weights[p + "layer_norm.weight"] + weights[p + "layer_norm.bias"]
        expected.append(mixed @ weights[p + "projection.weight"].T + weights[p + "projection.bias"])
    assert torch.allclose(projector(states), torch.cat(expected, 1), atol=1e-5)


def test_computes_in_fp32_whatever_the_states_are() -> None:
    torch.manual_seed(0)
    projector = StyleProjector(CONFIG)
    for parameter in projector.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16()
    states = {layer: torch.randn(1, 9, 6).bfloat16() for layer in (-20, -11, -2)}
    wide = {layer: state.float() for layer, state in states.items()}
    assert projector(states).dtype == torch.float32
    assert torch.equal(projector(states), projector(wide))


@torch.inference_mode()
def test_golden(synth_models: Path, synthetic, golden) -> None:
    file = TensorFile.open(synth_models / "model_patches/uso-flux1-projector-v1.safetensors")
    projector = load_projector(file.component("uso_projector"))
    states = {
        layer: synthetic(f"sig.a.{level}", (1, 729, 1152), 2)
        for level, layer in (("low", -20), ("mid", -11), ("high", -2))
    }
    result = golden("projector").check("tokens.a", projector(states).numpy(), 1e-4)
    assert result["ok"], result

"""The small models' transformer and LoRA (fixture `small_models`), and what a transformer answers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux import Flux
from usoflow.models.weights import Linear, LowRank


def transformer_of(models: Path) -> Component:
    """Of the all-in-one file."""
    return TensorFile.open(models / "checkpoints" / "flux1-dev-fp8.safetensors").components()["flux"]


def lora_of(models: Path) -> Component:
    """USO's."""
    return TensorFile.open(models / "loras" / "uso-flux1-dit-lora-v1.safetensors").component("uso_lora")


@torch.inference_mode()
def velocity(
    flux: Flux,
    dtype: torch.dtype = torch.float32,
    *,
    height: int = 8,
    reference: bool = False,
    device: str = "cpu",
) -> Tensor:
    """Of the same noise every time, [1, C, height, 8]; computed on this device."""
    torch.manual_seed(0)
    c = flux.config
    latent, text = torch.randn(1, c.channels, height, 8).to(device), torch.randn(1, 4, c.text_dim).to(device)
    pooled = torch.randn(1, c.pooled_dim).to(device)
    references = [torch.randn(1, c.channels, 4, 4).to(device)] if reference else []
    inputs = flux.prepare(text, pooled, (height, 8), references=references, dtype=dtype)
    answer: Tensor = flux(latent, torch.tensor(0.5, device=device), inputs)
    return answer


def relative(found: Tensor, expected: Tensor) -> float:
    """L2 distance."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def require_exact_branches(layer: Linear) -> None:
    """A low-rank branch takes what the layer [32, 64] is given before it is rounded to 8 bits."""
    x = torch.randn(5, 64).bfloat16()
    plain = layer(x)
    down, up = torch.randn(4, 64).bfloat16() * 8, torch.randn(32, 4).bfloat16() * 8
    layer.branches.append(LowRank(down, up, strength=1.0))
    branch = x.double() @ down.double().T @ up.double().T
    assert relative(layer(x).double() - plain.double(), branch) < 5e-3  # bf16's rounding, not that of 8 bits
    assert relative(layer(x, gelu=True), torch.nn.functional.gelu(layer(x), approximate="tanh")) < 5e-3

"""A folder of small models with random weights, in the layout and under the names of the official files.

Loaded by the ordinary loaders and run by the official workflows, in a second; the pictures are noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from usoflow.catalogue import KNOWN_FILES
from usoflow.models.checkpoint import CONFIG_KEY
from usoflow.models.clip import ClipText, ClipTextConfig
from usoflow.models.flux import Flux
from usoflow.models.flux_config import FluxConfig
from usoflow.models.style_projector import StyleProjector, StyleProjectorConfig
from usoflow.models.t5 import T5Config, T5Encoder
from usoflow.models.vae import AutoEncoder, VaeConfig
from usoflow.models.vision import SiglipConfig, SiglipVision

FLUX = FluxConfig(
    hidden=128, text_dim=64, pooled_dim=32, mlp_dim=512, channels=16,
    double_blocks=2, single_blocks=2, guidance=True, head_dim=32, axes=(8, 12, 12),
)  # fmt: skip
CLIP = ClipTextConfig(dim=32, mlp_dim=64, layers=2, positions=77, heads=2)
T5 = T5Config(dim=64, inner_dim=64, mlp_dim=128, layers=1, heads=2, min_length=32)
VAE = VaeConfig(widths=(16, 16, 32, 32), blocks=1, groups=8)
SIGLIP = SiglipConfig(dim=64, mlp_dim=128, layers=20, heads=2, patch=14, grid=8, image_size=112)
PROJECTOR = StyleProjectorConfig(patches=64, style_tokens=8, vision_dim=64, hidden=FLUX.hidden)
LORA_RANK = 4


def write_untrained(models: Path, *, seed: int = 0) -> None:
    """Write the four files that the official USO workflows name, in fp16.

    Args:
        models: a models folder; made if need be.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "model.diffusion_model.": Flux(FLUX),
        "text_encoders.clip_l.transformer.": ClipText(CLIP),
        "text_encoders.t5xxl.transformer.": T5Encoder(T5),
        "vae.": AutoEncoder(VAE),
    }
    checkpoint = {
        prefix + k: v for prefix, part in parts.items() for k, v in _random(part, generator).items()
    }
    declared: Mapping[str, Any] = {
        "flux": {"axes": list(FLUX.axes)},
        "clip_l": {"heads": CLIP.heads},
        "t5": {"min_length": T5.min_length},
        "vae": {"groups": VAE.groups},
    }
    tower = {"vision_model." + k: v for k, v in _random(SiglipVision(SIGLIP), generator).items()}
    contents: list[tuple[dict[str, Tensor], Mapping[str, Any]]] = [
        (checkpoint, declared),
        (_random_lora(generator), {}),
        (_random(StyleProjector(PROJECTOR), generator), {}),
        (tower, {"siglip": {"heads": SIGLIP.heads, "image_size": SIGLIP.image_size}}),
    ]
    for file, (tensors, config) in zip(KNOWN_FILES, contents, strict=True):
        path = models / file.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        narrow = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(narrow, path, metadata={CONFIG_KEY: json.dumps(config)} if config else None)


def _random(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of a scale that keeps activations near 1: norms at one, biases at zero."""
    return {
        name: _random_tensor(name, parameter.shape, generator)
        for name, parameter in module.named_parameters()
    }


def _random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    fan_in = math.prod(shape[1:])
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)


def _random_lora(generator: torch.Generator) -> dict[str, Tensor]:
    """ByteDance's layout, for every block of the transformer."""
    width = FLUX.hidden
    layers = {"qkv_lora1": (width, 3 * width), "proj_lora1": (width, width)}
    layers |= {"qkv_lora2": (width, 3 * width), "proj_lora2": (width, width)}
    single = {"qkv_lora": (width, 3 * width), "proj_lora": (width + FLUX.mlp_dim, width)}
    found: dict[str, Tensor] = {}
    for blocks, count, sizes in (
        ("double_blocks", FLUX.double_blocks, layers),
        ("single_blocks", FLUX.single_blocks, single),
    ):
        for number in range(count):
            for name, (inputs, outputs) in sizes.items():
                stem = f"{blocks}.{number}.processor.{name}"
                found[f"{stem}.down.weight"] = (
                    torch.randn(LORA_RANK, inputs, generator=generator) / inputs**0.5
                )
                found[f"{stem}.up.weight"] = torch.randn(outputs, LORA_RANK, generator=generator) * 0.1
    return found

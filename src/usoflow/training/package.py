"""From trained modules to the all-in-one checkpoint that the ordinary loaders read.

Takes the trained `AutoEncoder` and `Pocket`; writes one safetensors file in the official key layout. What no
tensor shape tells goes into `usoflow.config`. Matrices are stored in fp16; in fp8 (e4m3fn) are the two
embedding tables, which are most of the rows, and, with a scale, what answers least to it: the text's own
matrices of the double blocks, those of the single blocks, and those of the vision tower's layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from usoflow.models import fp8
from usoflow.models.checkpoint import CONFIG_KEY, SCALE
from usoflow.models.style_projector import StyleProjector
from usoflow.models.tokens import CLIP_VOCABULARY
from usoflow.models.vae import AutoEncoder
from usoflow.models.vision import SiglipVision
from usoflow.training.base import PREFIXES, BaseStage, Pocket
from usoflow.training.kept import write_tensors

T5_ROWS = 32128
T5_TABLE = PREFIXES["t5"] + "shared.weight"
USO_FILES = {
    "clip_vision": "usoflow-pocket-vision.safetensors",
    "model_patches": "usoflow-pocket-projector.safetensors",
    "loras": "usoflow-pocket-uso-lora.safetensors",
}
CLIP_TABLE = PREFIXES["clip"] + "text_model.embeddings.token_embedding.weight"
BLOCK_MATRICES = re.compile(
    r"model\.diffusion_model\.(double_blocks\.\d+\.txt_(attn|mlp|mod)\.(qkv|proj|0|2|lin)"
    r"|single_blocks\.\d+\.(linear1|linear2|modulation\.lin))\.weight"
)
# But for those of the layers that are set (`colours`): their sums of large numbers are to be exact.
TOWER_MATRICES = re.compile(r"vision_model\.encoder\.layers\.(?![01]\.)\d+\.(self_attn|mlp)\..*\.weight")


def declaration(stage: BaseStage, vae: AutoEncoder) -> str:
    """What no shape tells, as the JSON of `usoflow.config`."""
    sections = {
        "flux": {"axes": list(stage.flux.axes), "side": stage.large_side},
        "t5": {"min_length": stage.t5_length},
        "clip_l": {"heads": stage.clip_dim // 16},
        "vae": {"groups": vae.config.groups},
    }
    return json.dumps(sections)


def tensors(pocket: Pocket, vae: AutoEncoder) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by its official key, with full vocabularies."""
    found = {"vae." + name: value for name, value in _values(vae).items()}
    for part, prefix in PREFIXES.items():
        found |= {prefix + name: value for name, value in _values(getattr(pocket, part)).items()}
    found[T5_TABLE] = pocket.t5_words.expand(found[T5_TABLE], T5_ROWS)
    found[CLIP_TABLE] = pocket.clip_words.expand(found[CLIP_TABLE], CLIP_VOCABULARY)
    tables = {name: found.pop(name).to(fp8.STORED) for name in (T5_TABLE, CLIP_TABLE)}
    return stored(found, BLOCK_MATRICES) | tables


def write(path: Path, pocket: Pocket, vae: AutoEncoder) -> None:
    """Write the checkpoint; the VAE must be `autoencoder.folded`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {CONFIG_KEY: declaration(pocket.stage, vae)}
    write_tensors(path, tensors(pocket, vae), metadata)


def _values(module: nn.Module) -> dict[str, Tensor]:
    """The module's own weights; the branches of a LoRA in training have a file of their own."""
    named = module.named_parameters()
    return {name: p.detach().clone().contiguous() for name, p in named if ".branches." not in name}


def write_uso(
    folder: Path, tower: SiglipVision, projector: StyleProjector, lora: Mapping[str, Tensor]
) -> None:
    """Write the vision tower, the projector and the LoRA, each in its official layout."""
    config = tower.config
    declared = json.dumps({"siglip": {"heads": config.heads, "image_size": config.image_size}})
    seen = {"vision_model." + name: value for name, value in _values(tower).items()}
    write_tensors(folder / USO_FILES["clip_vision"], stored(seen, TOWER_MATRICES), {CONFIG_KEY: declared})
    write_tensors(folder / USO_FILES["model_patches"], stored(_values(projector)))
    write_tensors(folder / USO_FILES["loras"], stored(lora))


def stored(values: Mapping[str, Tensor], narrow: re.Pattern[str] | None = None) -> dict[str, Tensor]:
    """Tensors as files hold them: fp16, and those of `narrow` names as scaled fp8, with `scale_weight`."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if narrow is not None and narrow.fullmatch(name):
            rounded, scale = fp8.rounded(value.detach().float().reshape(1, -1))
            found[name] = rounded.view(value.shape)
            found[f"{name.rpartition('.')[0]}.{SCALE}"] = scale.squeeze()
        else:
            found[name] = value.detach().to(torch.float16).contiguous()
    return found

"""LoRA files: which linear layer of the transformer each low-rank pair belongs to, and attaching them.

The layout here is ByteDance's (bytedance/USO, `dit_lora.safetensors`): attention processors with
`qkv_lora` and `proj_lora`, recognised by name whatever the depth. There is no alpha: the scale is 1.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, some
from usoflow.models.flux import Flux
from usoflow.models.weights import Linear, LowRank, read_tensors

logger = logging.getLogger(__name__)

_PAIR = re.compile(
    r"^(?P<stem>(?P<blocks>(?:double|single)_blocks)\.(?P<number>\d+)\.processor\.(?P<part>\w+))"
    r"\.(?:up|down)\.weight$"
)
# Lora 1 is the image stream, 2 the text stream. `qkv_lora` of a single block covers the rows of
# linear1 (q, k, v) and leaves the MLP's alone.
_TARGETS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("double_blocks", "qkv_lora1"): "img_attn.qkv",
        ("double_blocks", "proj_lora1"): "img_attn.proj",
        ("double_blocks", "qkv_lora2"): "txt_attn.qkv",
        ("double_blocks", "proj_lora2"): "txt_attn.proj",
        ("single_blocks", "qkv_lora"): "linear1",
        ("single_blocks", "proj_lora"): "linear2",
    }
)


def attach(flux: Flux, lora: Component, strength: float, *, device: torch.device | None = None) -> None:
    """Add the branches of a LoRA file to a transformer.

    Args:
        flux: a transformer of its own (weights may be shared with others, the module is changed).
        lora: a component of kind `uso_lora`.
        strength: factor of every branch.
        device: where the branches are kept; default as read.

    Raises:
        UsoflowError: `lora_mismatch` if nothing fits or a pair has the wrong shape, `tensor_missing` if a
            pair is not one.
    """
    layers = {name: layer for name, layer in flux.named_modules() if isinstance(layer, Linear)}
    pairs = dict(_pairs(lora))
    fitting = {stem: target for stem, target in pairs.items() if target in layers}
    absent = [stem for stem in pairs if stem not in fitting]
    if not fitting:
        raise UsoflowError(
            "lora_mismatch", f"{lora.file.path.name}: none of its {len(pairs)} layers is in this model."
        )
    if absent:
        logger.warning(
            "%s: %d of %d layers are for blocks that this model does not have (%s); the others are applied.",
            lora.file.path.name, len(absent), len(pairs), some(absent, 2),
        )  # fmt: skip
    tensors = read_tensors(lora, [f"{stem}.{side}.weight" for stem in fitting for side in ("down", "up")])
    for stem, target in fitting.items():
        down, up = tensors[f"{stem}.down.weight"], tensors[f"{stem}.up.weight"]
        _check_pair(lora, stem, layers[target], down, up)
        layers[target].branches.append(LowRank(down.to(device), up.to(device), strength=strength))


def _pairs(lora: Component) -> Iterator[tuple[str, str]]:
    """(name of the pair in the file, name of the layer in the transformer)."""
    for name in lora.tensors:
        match = _PAIR.match(name)
        target = _TARGETS.get((match["blocks"], match["part"])) if match else None
        if match is None or target is None:
            raise UsoflowError("lora_mismatch", f"{lora.file.path.name}: {name} belongs to no known layer.")
        for side in ("up", "down"):
            lora.shape(f"{match['stem']}.{side}.weight")
        yield match["stem"], f"{match['blocks']}.{match['number']}.{target}"


def _check_pair(lora: Component, stem: str, layer: Linear, down: Tensor, up: Tensor) -> None:
    rows, columns = layer.weight.shape
    rows = 3 * columns if stem.endswith("qkv_lora") else rows  # q, k, v
    if tuple(up.shape) != (rows, down.shape[0]) or down.shape[1:] != (columns,):
        raise UsoflowError(
            "lora_mismatch",
            f"{lora.file.path.name}: {stem} is {list(up.shape)} x {list(down.shape)},"
            f" the layer {list(layer.weight.shape)}.",
        )

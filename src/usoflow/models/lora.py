"""Attaching LoRA files to networks, as branches beside their linear layers.

Which pair belongs to which layer: `lora_layouts`.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from usoflow.errors import UsoflowError, some
from usoflow.models.checkpoint import Component
from usoflow.models.lora_layouts import Pair, PeftScales, pairs_for
from usoflow.models.weights import Linear, LowRank, read_tensors

logger = logging.getLogger(__name__)


def attach(
    network: nn.Module,
    lora: Component,
    strength: float,
    *,
    role: str = "flux",
    device: torch.device | None = None,
) -> None:
    """Add the branches of a LoRA file to a network.

    Args:
        network: of its own (weights may be shared with others, the module is changed).
        lora: a component of kind `uso_lora` or `lora`.
        strength: factor of every branch.
        role: "flux" for the transformer; "clip_l" or "t5", for which a file need not have anything.
        device: where the branches are kept; default as read.

    Raises:
        UsoflowError: `lora_mismatch` if nothing of what is for the transformer fits it or a pair has the
            wrong shape, `tensor_missing` if a pair is not one.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Linear)}
    pairs = pairs_for(lora, role, {name: layer.shape for name, layer in layers.items()})
    if role == "flux" and not pairs.total:
        logger.warning("%s has nothing for the transformer.", lora.file.path.name)
    elif role == "flux" and not pairs.fitting:
        raise UsoflowError(
            "lora_mismatch", f"{lora.file.path.name}: none of its {pairs.total} layers is in this model."
        )
    if pairs.absent:
        logger.warning(
            "%s: %d of %d layers are for blocks that this model does not have (%s); the others are applied.",
            lora.file.path.name, len(pairs.absent), pairs.total, some(pairs.absent, 2),
        )  # fmt: skip
    if pairs.repeated:
        logger.warning(
            "%s: %d pairs are left out (%s): others, by other names, change the same rows.",
            lora.file.path.name, len(pairs.repeated), some(pairs.repeated, 2),
        )  # fmt: skip
    if role == "flux" and pairs.strange:
        logger.warning(
            "%s: %d tensors are no low-rank pairs (%s); they are left out.",
            lora.file.path.name, len(pairs.strange), some(pairs.strange, 2),
        )  # fmt: skip
    names = [name for pair in pairs.fitting for name in (pair.down, pair.up, pair.alpha) if name]
    tensors, scales = read_tensors(lora, names), PeftScales.of(lora, role)
    for pair in pairs.fitting:
        for branch in _branches(pair, tensors, strength, scales, device):
            layers[pair.layer].branches.append(branch)


def _branches(
    pair: Pair,
    tensors: dict[str, torch.Tensor],
    strength: float,
    scales: PeftScales,
    device: torch.device | None,
) -> list[LowRank]:
    down, up = tensors[pair.down].to(device), tensors[pair.up].to(device)
    rank = down.shape[0]
    alpha = None if pair.alpha is None else float(tensors[pair.alpha])
    strength *= scales.of_pair(pair.stem, rank) if alpha is None else alpha / rank
    parts = up.split([count for _, count in pair.rows])
    return [
        LowRank(down, part, strength=strength, first_row=first)
        for part, (first, _) in zip(parts, pair.rows, strict=True)
    ]

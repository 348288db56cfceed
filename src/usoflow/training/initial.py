"""First weights of a network that is to be trained.

Called by the training stages on a module of `usoflow.models` whose parameters are still empty.
"""

from __future__ import annotations

import torch
from torch import nn

from usoflow.models.weights import Conv2d, Embedding, GroupNorm, LayerNorm, Linear, RMSNorm

EMBEDDING_STD = 0.5


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator, *, zero: tuple[str, ...] = ()) -> None:
    """Fill every parameter: matrices normal with variance 1 / fan-in, norms one, biases zero.

    Args:
        module: built from the layers of `usoflow.models.weights`, on the CPU.
        generator: random numbers; the same generator state gives the same weights.
        zero: ends of names of layers that begin at zero, so that a residual branch begins as nothing.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (LayerNorm, RMSNorm, GroupNorm)):
            for leaf, parameter in layer.named_parameters(recurse=False):
                parameter.fill_(0.0 if leaf == "bias" else 1.0)
        elif isinstance(layer, Embedding):
            layer.weight.normal_(0, EMBEDDING_STD, generator=generator)
        elif isinstance(layer, (Linear, Conv2d)):
            fan_in = layer.weight[0].numel()
            layer.weight.normal_(0, fan_in**-0.5, generator=generator)
            if name.endswith(zero) and zero:
                layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
    for parameter in module.parameters():
        parameter.requires_grad_(True)

"""The first layers of the pocket vision tower, which are not learnt but set: they know exact colours.

What tells the drawing sets apart are exact colours, and a network learns last what varies fast with its input
(arXiv 1806.08734). Fourier features need not wait for that (arXiv 2006.10739): after two layers a token holds
sine and cosine, at four frequencies, of each colour of two pixels of its patch, beside these colours and the
lowest coefficients of the patch's cosine transform. All this is within SigLIP's architecture: the patch
embedding picks, and the MLPs of the first two layers, whose attention is silent, are fitted to the waves.

Before each MLP stands a layer norm. What it divides by is made nearly constant: in the first layer by a large
bias of the embedding, which the layer takes back, in the second by the first one's sines and cosines, whose
squares add up to one. What it subtracts cancels, since each colour is held twice, with either sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usoflow.models.encoder import EncoderLayer
from usoflow.models.vision import SiglipVision, gelu

OCTAVES = (1, 2, 3, 4)  # waves are sin and cos of pi 2^k c, with a colour c in -1..1
PIXELS = (1 / 2, 1 / 4)  # where in a patch they are, down and across; one for each of the layers
COLOURS = 6  # features of a pixel: three colours, and the same with the other sign
WAVES = 3 * 2 * len(OCTAVES)  # features of a pixel
LEAST_DIM = len(PIXELS) * (COLOURS + WAVES) + 3  # with a single coefficient of the transform
SMALL = 0.1  # size of the colours among the features
LOUD = 32.0  # size of the embedding's bias
COEFFICIENT = 0.12  # size of a coefficient of the cosine transform, more for higher frequencies
POSITION = 0.2  # what is left of the first position embeddings
SPREAD = 0.38  # what features but waves add to the sum of squares in the second layer
STEEPNESS = 0.75  # of the MLP's units, in units per distance of their knots
RIDGE = 1e-4  # of the fit


def waves_of(colours: Tensor, octaves: Iterable[int]) -> list[Tensor]:
    """sin and cos of pi 2^k c for each octave k, for colours c in -1..1 of any shape."""
    return [wave(math.pi * 2**k * colours) for k in octaves for wave in (torch.sin, torch.cos)]


@torch.no_grad()
def know_colours(tower: SiglipVision) -> list[nn.Parameter]:
    """Set the patch embedding and the first two layers; they are returned, and not to be trained.

    Args:
        tower: with its first weights; its MLPs must have a multiple of three units.
    """
    config, layers = tower.config, tower.encoder.layers
    first = len(PIXELS) * COLOURS
    coefficients = (config.dim - first - len(PIXELS) * WAVES) // 3
    waves = first + 3 * coefficients
    bias = torch.full((config.dim,), LOUD)
    bias[::2] = -LOUD
    bias[:first] = 0
    embedding = tower.embeddings.patch_embedding
    embedding.weight.copy_(_picked(config.dim, config.patch, coefficients))
    assert embedding.bias is not None
    embedding.bias.copy_(bias)
    positions = tower.embeddings.position_embedding.weight
    positions.mul_(POSITION)
    positions[:, :first], positions[:, waves:] = 0, 0
    positions[:, first:waves] -= positions[:, first:waves].mean(dim=1, keepdim=True)
    squares = (LOUD**2 * (config.dim - first), WAVES / 2 + SPREAD)
    for number in range(len(PIXELS)):
        taken_back = bias if number == 0 else torch.zeros_like(bias)
        deviation = math.sqrt(squares[number] / config.dim)
        _bend(layers[number], number * COLOURS, waves + number * WAVES, deviation, taken_back)
    set_ = (tower.embeddings, *layers[: len(PIXELS)])
    return [parameter.requires_grad_(False) for module in set_ for parameter in module.parameters()]


def _picked(dim: int, patch: int, coefficients: int) -> Tensor:
    """The patch embedding's kernel, [dim, 3, patch, patch]: two pixels' colours, and a cosine transform."""
    weight = torch.zeros(dim, 3, patch, patch)
    for number, part in enumerate(PIXELS):
        place = int(part * patch)
        for colour in range(3):
            weight[number * COLOURS + colour, colour, place, place] = SMALL
            weight[number * COLOURS + 3 + colour, colour, place, place] = -SMALL
    first = len(PIXELS) * COLOURS
    last = first + 3 * coefficients
    index = torch.arange(patch)
    basis = torch.cos(math.pi * (index + 0.5) * index[:, None] / patch) * math.sqrt(2 / patch)
    basis[0] *= math.sqrt(1 / 2)
    orders = sorted(((u, v) for u in range(patch) for v in range(patch)), key=lambda uv: (sum(uv), uv))
    for number, (u, v) in enumerate(orders[:coefficients]):
        wave = torch.outer(basis[u], basis[v]) / patch * (1 + u + v) * COEFFICIENT
        for colour in range(3):
            weight[first + 3 * number + colour, colour] = wave
    weight[first:last] -= weight[first:last].mean(dim=0)  # so that the norm subtracts nothing of them
    return weight


def _bend(layer: nn.Module, colours: int, waves: int, deviation: float, taken_back: Tensor) -> None:
    """Let a layer's MLP add waves of colours.

    Args:
        layer: of the tower.
        colours: the first feature of a pixel's.
        waves: the first feature of what is added.
        deviation: of all features, by which the norm divides.
        taken_back: subtracted from the features.
    """
    assert isinstance(layer, EncoderLayer)
    norm, up, down = layer.layer_norm2, layer.mlp.fc1, layer.mlp.fc2
    for parameter in layer.self_attn.out_proj.parameters():
        parameter.zero_()
    assert norm.weight is not None
    assert norm.bias is not None
    norm.weight.fill_(1.0)
    norm.weight[colours : colours + COLOURS] = deviation / SMALL
    norm.bias.zero_()
    units = up.shape[0] // 3
    knots = torch.linspace(-1.02, 1.0, units)
    steepness = STEEPNESS * units
    bent, added = _fit(knots, steepness)
    for parameter in (*up.parameters(), *down.parameters()):
        parameter.zero_()
    assert up.bias is not None
    assert down.bias is not None
    down.bias.sub_(taken_back)
    for colour in range(3):
        own = slice(colour * units, (colour + 1) * units)
        up.weight[own, colours + colour] = steepness / 2
        up.weight[own, colours + 3 + colour] = -steepness / 2
        up.bias[own] = -steepness * knots
        first = waves + colour * len(added)
        down.weight[first : first + len(added), own] = bent
        down.bias[first : first + len(added)] += added


def _fit(knots: Tensor, steepness: float) -> tuple[Tensor, Tensor]:
    """How units gelu(steepness * (c - knot)) add up to the waves: weights [waves, units], biases [waves]."""
    c = torch.linspace(-1, 1, 256)
    units = F.pad(gelu(steepness * (c[:, None] - knots)), (0, 1), value=1.0).double()
    waves = torch.stack(waves_of(c, OCTAVES), dim=1)
    ridge = RIDGE * torch.eye(units.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(units.T @ units + ridge, units.T @ waves.double()).float()
    return weights[:-1].T, weights[-1]

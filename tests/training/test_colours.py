"""What the vision tower's first layers are set to."""

from __future__ import annotations

import math

import pytest
import torch

from usoflow.models.vision import SiglipConfig, SiglipVision, preprocess
from usoflow.training.colours import COLOURS, OCTAVES, PIXELS, WAVES, know_colours
from usoflow.training.initial import initialise


@torch.no_grad()
def test_tokens_hold_waves_of_the_colours_of_two_pixels() -> None:
    """In a smooth picture; of the second pixel less exactly, for its norm is not constant."""
    config = SiglipConfig(96, 192, 20, 3, 16, 8, 128)
    tower = SiglipVision(config)
    initialise(tower, torch.Generator().manual_seed(0), zero=("self_attn.out_proj", "mlp.fc2"))
    know_colours(tower)
    torch.manual_seed(0)
    coarse = torch.rand(4, 3, 6, 6)
    pictures = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic").clamp(0, 1).movedim(1, -1)
    pixels = preprocess(pictures, 128)
    hidden = tower(pixels, [-19]).hidden[-19]
    for number, part in enumerate(PIXELS):
        place = int(part * 16)
        colours = pixels[:, :, place::16, place::16].flatten(2).transpose(1, 2)  # [B, patches, 3]
        assert torch.allclose(hidden[..., number * COLOURS : number * COLOURS + 3], 0.1 * colours, atol=1e-5)
        first = 96 - (len(PIXELS) - number) * WAVES
        held = hidden[..., first : first + WAVES].unflatten(-1, (3, len(OCTAVES), 2))
        for index, octave in enumerate(OCTAVES):
            angle = math.pi * 2**octave * colours
            wanted = torch.stack([angle.sin(), angle.cos()], dim=-1)
            error = (held[..., index, :] - wanted).square().mean().sqrt()
            assert error < (0.01 if number == 0 else 0.04 * 2**octave)


def test_what_is_set_is_not_trained() -> None:
    tower = SiglipVision(SiglipConfig(96, 192, 20, 3, 16, 8, 128))
    initialise(tower, torch.Generator().manual_seed(0))
    kept = {id(parameter) for parameter in know_colours(tower)}
    for name, parameter in tower.named_parameters():
        is_set = name.startswith(("embeddings.", "encoder.layers.0.", "encoder.layers.1."))
        assert (id(parameter) in kept) == is_set == (not parameter.requires_grad)


@pytest.mark.parametrize("sizes", [{"dim": 32}, {"layers": 12}])
def test_a_tower_without_room_is_refused(sizes: dict[str, int]) -> None:
    from usoflow.training.loop import Recipe
    from usoflow.training.tower import TowerStage

    with pytest.raises(ValueError, match="a tower needs"):
        TowerStage(Recipe(samples=1, batch=1, rate=1.0), **sizes)

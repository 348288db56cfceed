"""Latents scaled, batched and tiled, against torch, formulas and the untiled VAE."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from usoflow.models.checkpoint import TensorFile
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.models.tiling import Grid, tiled
from usoflow.models.vae import AutoEncoder
from usoflow.nodes import latent, latent_batch
from usoflow.nodes.handles import VaeHandle
from usoflow.nodes.resize import bislerp

METHODS = ("nearest-exact", "bilinear", "area", "bicubic")


def latents(batch: int = 1, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_scaling_is_torchs(method: str) -> None:
    scaled = latent_batch.upscale_by({"samples": latents(2)}, method, 1.5)["samples"]
    assert torch.allclose(scaled, F.interpolate(latents(2), size=(12, 18), mode=method), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (160, 80, (10, 20)),
        (0, 80, (10, 15)),
        (192, 0, (16, 24)),
        (8, 8, (8, 8)),
        (16, 0, (8, 8)),
        (0, 0, (8, 12)),
    ],
)
def test_scaling_to_pixels(width: int, height: int, expected: tuple[int, int]) -> None:
    """Sides in pixels; 64 pixels are the least."""
    scaled = latent_batch.upscale({"samples": latents()}, "bilinear", width, height, crop="disabled")
    assert scaled["samples"].shape[-2:] == expected


def test_scaling_with_a_crop_keeps_the_middle() -> None:
    scaled = latent_batch.upscale({"samples": latents()}, "bilinear", 64, 64, crop="center")["samples"]
    assert torch.allclose(scaled, latents()[..., 2:10], atol=1e-6)


def test_bislerp_turns_and_stretches_evenly() -> None:
    """Vectors of length 1 and 3, a quarter turn apart: halfway 45 degrees and length 2."""
    line = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).reshape(1, 1, 2, 2)  # [B, H, W, C]
    scaled = bislerp(line, 4, 1)[0, 0]
    places = [0.0, 0.25, 0.75, 1.0]  # of the four samples between the two vectors
    for vector, part in zip(scaled.tolist(), places, strict=True):
        length, angle = 1 + 2 * part, part * math.pi / 2
        assert vector == pytest.approx([length * math.cos(angle), length * math.sin(angle)], abs=1e-5)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])
def test_bislerp_is_linear_along_a_line(factor: float) -> None:
    a = latents(1, 1, 1).movedim(1, -1)
    line = torch.cat([a, a * factor], dim=2)
    linear = F.interpolate(line.movedim(-1, 1), size=(1, 6), mode="bilinear").movedim(1, -1)
    assert torch.allclose(bislerp(line, 6, 1), linear, atol=1e-3)


def test_taking_out_of_a_batch_keeps_places_and_masks() -> None:
    masks = torch.rand(2, 4, 4)
    taken = latent_batch.from_batch({"samples": latents(5), "noise_mask": masks}, 3, 4)
    assert torch.equal(taken["samples"], latents(5)[3:])
    assert taken["batch_index"] == [3, 4]
    assert torch.equal(taken["noise_mask"], masks[[1, 0]])  # masks go round: 0 1 0 1 0
    again = latent_batch.from_batch(taken, 1, 1)
    assert again["batch_index"] == [4]
    assert latent_batch.from_batch({"samples": latents(2)}, 9, 9)["batch_index"] == [1]


def test_repeating_gives_new_places() -> None:
    batch = {"samples": latents(2), "batch_index": [4, 6], "noise_mask": torch.rand(1, 4, 4)}
    repeated = latent_batch.repeat_batch(batch, 3)
    assert torch.equal(repeated["samples"], latents(2).repeat(3, 1, 1, 1))
    assert repeated["batch_index"] == [4, 6, 7, 9, 10, 12]
    assert repeated["noise_mask"].shape == (1, 4, 4)


def test_mask_of_a_latent() -> None:
    assert latent_batch.set_noise_mask({"samples": latents()}, torch.ones(4, 4))["noise_mask"].shape == (
        1,
        4,
        4,
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 24), st.integers(0, 5))
def test_tiles_cover_a_side(length: int, tile: int, overlap: int) -> None:
    overlap = min(overlap, tile // 4)
    spans = Grid(tile, overlap, 1, 1).spans(length)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(end - start == min(tile, length) for start, end in spans)
    assert all(before[1] - after[0] >= overlap for before, after in pairwise(spans))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_tiles_of_a_local_function_are_the_whole(before: int, after: int) -> None:
    """Whatever looks at single places gives the same in tiles."""
    source = torch.rand(2, 3, 10 * before, 15 * before)

    def local(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=4) ** 2 if after == 4 else F.avg_pool2d(x, 4).exp()

    assert torch.allclose(tiled(local, source, Grid(4, 1, before, after)), local(source), atol=1e-6)


def test_tiles_fade_into_each_other() -> None:
    """Two tiles that answer 0 and 1: the seam rises evenly over the overlap."""
    answers = iter([0.0, 1.0])
    faded = tiled(lambda x: torch.full_like(x, next(answers)), torch.zeros(1, 1, 1, 12), Grid(8, 4, 1, 1))
    row = faded[0, 0, 0]
    assert torch.equal(row[:4], torch.zeros(4))
    assert torch.equal(row[8:], torch.ones(4))
    assert torch.allclose(row[4:8], torch.tensor([0.125, 0.375, 0.625, 0.875]))


@pytest.fixture
def lent(small_models: Path) -> tuple[Any, VaeHandle]:
    checkpoint = TensorFile.open(small_models / "checkpoints" / "flux1-dev-fp8.safetensors")
    library = ModelLibrary(Placement.choose("cpu", "fp32"))
    return SimpleNamespace(library=library), VaeHandle(checkpoint.component("vae"))


def test_one_tile_is_the_plain_vae(lent: tuple[Any, VaeHandle]) -> None:
    context, vae = lent
    picture = torch.rand(1, 50, 66, 3)
    encoded = latent.vae_encode_tiled(picture, vae, 128, 32, context=context)
    plain = latent.vae_encode(picture, vae, context=context)
    assert torch.allclose(encoded["samples"], plain["samples"], atol=1e-5)
    decoded = latent.vae_decode_tiled(encoded, vae, 128, 32, context=context)
    assert torch.allclose(decoded, latent.vae_decode(encoded, vae, context=context), atol=1e-6)


def test_tiles_do_not_push_out_what_is_known(lent: tuple[Any, VaeHandle]) -> None:
    """Of the pictures that were encoded whole the last ones are kept; parts of one are no pictures."""
    context, vae = lent
    latent.vae_encode(torch.rand(1, 32, 32, 3), vae, context=context)
    known = list(context.library._encodings)
    latent.vae_encode_tiled(torch.rand(1, 320, 320, 3), vae, 64, 0, context=context)
    assert list(context.library._encodings) == known


def test_tiles_bound_what_is_decoded_at_once(
    lent: tuple[Any, VaeHandle], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, vae = lent
    sizes: list[tuple[int, ...]] = []
    decode = AutoEncoder.decode

    def watched(module: AutoEncoder, latents: Tensor, **options: Any) -> Tensor:
        sizes.append(tuple(latents.shape[-2:]))
        return decode(module, latents, **options)

    monkeypatch.setattr(AutoEncoder, "decode", watched)
    decoded = latent.vae_decode_tiled({"samples": latents(1, 16, 12)}, vae, 64, 0, context=context)
    assert decoded.shape == (1, 128, 96, 3)
    assert set(sizes) == {(8, 8)}

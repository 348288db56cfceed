"""Weights ready, as stored and passing through: the same velocity, within the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary, load_flux
from usoflow.models.pages import mapped
from usoflow.models.placement import Placement, bytes_of
from usoflow.models.residence import Sizes

CPU = torch.device("cpu")


def flux_of(models: Path, budget: int | None, dtype: torch.dtype) -> Flux:
    path = models / "checkpoints" / "flux1-dev-fp8.safetensors"
    library = ModelLibrary(Placement(CPU, dtype, budget))
    return library.flux(TensorFile.open(path).components()["flux"], (), "default")


def velocity(flux: Flux, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    c = flux.config
    latent, text, pooled = (
        torch.randn(1, c.channels, 8, 8),
        torch.randn(1, 4, c.text_dim),
        torch.randn(1, c.pooled_dim),
    )
    with torch.inference_mode():
        return flux(latent, torch.tensor(0.5), flux.prepare(text, pooled, (8, 8), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_plan_gives_the_same_numbers(small_models: Path, dtype: torch.dtype) -> None:
    ready = velocity(flux_of(small_models, None, dtype), dtype)
    stored = Sizes.of(plain := flux_of(small_models, 10_000_000_000, dtype), plain.blocks, dtype).stored
    for budget in (stored, stored - 1, 1):
        assert torch.equal(velocity(flux_of(small_models, budget, dtype), dtype), ready)


def test_pages_that_were_given_back_are_read_again(small_models: Path) -> None:
    """Twice through the blocks: the second time from pages that had left."""
    path = small_models / "checkpoints" / "flux1-dev-fp8.safetensors"
    component = TensorFile.open(path).components()["flux"]
    flux = ModelLibrary(Placement(CPU, torch.float32, 1)).flux(component, (), "default")
    assert mapped(flux.blocks[0].parameters()), "the file is mapped"
    first, second = (velocity(flux, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


def test_memory_of_ones_own_has_no_pages_to_give_back(small_models: Path) -> None:
    assert mapped([torch.ones(1 << 16), torch.empty(0)]) == []
    component = TensorFile.open(small_models / "checkpoints" / "flux1-dev-fp8.safetensors").components()[
        "flux"
    ]
    assert mapped(load_flux(component).parameters())


def test_blocks_fill_a_budget_from_the_first() -> None:
    sizes = Sizes(stored=100, ready=200, blocks=(20, 20, 20, 20))
    assert sizes.resident(100) == 4
    assert sizes.resident(99) == 1  # 20 that are no block's, two blocks on their way, and one that fits
    assert sizes.resident(10) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("6.5 gb", 6_500_000_000), ("512M", 512 * 10**6), ("7GiB", 7 * 10**9), ("123", 123)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "eight", "0GB", "8 GB GB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsoflowError) as caught:
        bytes_of(text)
    assert caught.value.code == "budget_invalid"


def test_a_smaller_plan_has_half() -> None:
    assert Placement(CPU, torch.float32, 1000).smaller.budget == 500

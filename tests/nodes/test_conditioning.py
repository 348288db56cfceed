"""Conditioning: what each node sets, and that it changes nothing that others hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from usoflow.nodes import conditioning, loaders
from usoflow.nodes.context import NodeContext


@pytest.fixture
def entries() -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Two entries with every option."""
    latent = torch.ones(1, 16, 2, 2)
    options = {"pooled_output": torch.ones(1, 4), "guidance": 2.0, "reference_latents": [latent]}
    return [(torch.ones(1, 3, 8), dict(options)), (torch.full((1, 2, 8), 2.0), {"pooled_output": None})]


def unchanged(before: Any, after: Any) -> bool:
    """Whether nested lists, dicts and tensors are equal."""
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(unchanged(before[k], after[k]) for k in before)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(unchanged, before, after))
    return bool(before == after)


@pytest.mark.parametrize(
    "use",
    [
        conditioning.zero_out,
        lambda c: conditioning.flux_guidance(c, 9.0),
        lambda c: conditioning.reference_latent(c, {"samples": torch.zeros(1)}),
        lambda c: conditioning.reference_method(c, "uso"),
    ],
    ids=["zero", "guidance", "reference", "method"],
)
def test_inputs_are_left_alone(entries: Any, use: Any) -> None:
    before = copy.deepcopy(entries)
    use(entries)
    assert unchanged(before, entries)


def test_zero_out_keeps_guidance_and_references(entries: Any) -> None:
    (text, options), (second, empty) = conditioning.zero_out(entries)
    assert not text.any()
    assert not options["pooled_output"].any()
    assert text.shape == (1, 3, 8)
    assert options["guidance"] == 2.0
    assert len(options["reference_latents"]) == 1
    assert not second.any()
    assert empty["pooled_output"] is None


def test_guidance_of_every_entry(entries: Any) -> None:
    assert [options["guidance"] for _, options in conditioning.flux_guidance(entries, 7.5)] == [7.5, 7.5]


def test_references_in_the_order_of_the_chain(entries: Any) -> None:
    a, b = ({"samples": torch.full((1, 16, 2, 2), value)} for value in (5.0, 6.0))
    chained = conditioning.reference_latent(conditioning.reference_latent(entries, a), b)
    assert [float(t.mean()) for t in chained[0][1]["reference_latents"]] == [1, 5, 6]
    assert [float(t.mean()) for t in chained[1][1]["reference_latents"]] == [5, 6]


def test_reference_without_latent_changes_nothing(entries: Any) -> None:
    """The official workflow leaves it unconnected where there is no subject."""
    assert conditioning.reference_latent(entries, None) is entries


def test_text_is_encoded_by_both_encoders(context: NodeContext) -> None:
    _, clip, _ = loaders.load_checkpoint("flux1-dev-fp8.safetensors", context=context)
    ((text, options),) = conditioning.encode_text("a cat", clip, context=context)
    assert text.shape == (1, 32, 64)  # the small T5's minimum length and width
    assert options["pooled_output"].shape == (1, 32)
    ((other, _),) = conditioning.encode_text("a dog", clip, context=context)
    assert not torch.equal(text, other)


@pytest.mark.parametrize("crop", ["center", "none"])
def test_vision_sees_every_picture_of_a_batch(context: NodeContext, crop: str) -> None:
    tower = loaders.load_clip_vision("sigclip_vision_patch14_384.safetensors", context=context)
    images = torch.rand(2, 30, 50, 3, generator=torch.Generator().manual_seed(0))
    both = conditioning.encode_vision(tower, images, crop, context=context)
    for index in range(2):
        alone = conditioning.encode_vision(tower, images[index : index + 1], crop, context=context)
        for layer, state in alone.hidden.items():
            assert torch.allclose(both.hidden[layer][index], state[0], atol=1e-4)


def test_crop_sees_the_middle_only(context: NodeContext) -> None:
    tower = loaders.load_clip_vision("sigclip_vision_patch14_384.safetensors", context=context)
    images = torch.rand(1, 30, 50, 3, generator=torch.Generator().manual_seed(0))
    framed = images.clone()
    framed[:, :, :5] = 0  # outside the middle square of 30

    def seen(pictures: torch.Tensor, crop: str) -> torch.Tensor:
        return conditioning.encode_vision(tower, pictures, crop, context=context).hidden[-2]

    assert torch.allclose(seen(images, "center"), seen(framed, "center"), atol=1e-5)
    assert not torch.allclose(seen(images, "none"), seen(framed, "none"), atol=1e-2)

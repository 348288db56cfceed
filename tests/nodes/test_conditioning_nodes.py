"""Conditionings put together, by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.nodes import conditioning
from usoflow.nodes.handles import ClipHandle

Entry = tuple[torch.Tensor, dict[str, Any]]


def entry(tokens: int, seed: int, **options: Any) -> Entry:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 4, generator=generator)
    return torch.randn(1, tokens, 6, generator=generator), {"pooled_output": pooled, **options}


def test_combining_keeps_both_with_their_options() -> None:
    a, b = entry(3, 0, guidance=2.0), entry(5, 1)
    combined = conditioning.combine([a], [b])
    assert [id(text) for text, _ in combined] == [id(a[0]), id(b[0])]
    assert combined[0][1]["guidance"] == 2.0


def test_concatenating_appends_tokens_and_keeps_the_firsts_options() -> None:
    a, b = entry(3, 0, guidance=2.0), entry(5, 1, guidance=9.0)
    ((text, options),) = conditioning.concat([a], [b])
    assert torch.equal(text, torch.cat([a[0], b[0]], dim=1))
    assert options == a[1]


@pytest.mark.parametrize("join", [conditioning.concat, conditioning.average])
def test_prompts_of_different_encoders_are_refused(join: Any) -> None:
    with pytest.raises(UsoflowError, match="6 and 8") as error:
        join([entry(3, 0)], [(torch.zeros(1, 3, 8), {})])
    assert error.value.code == "models_mismatch"


@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_averaging(tokens: int) -> None:
    a, b = entry(3, 0, guidance=2.0), entry(tokens, 1)
    ((text, options),) = conditioning.average([a], [b], 0.25)
    other = torch.zeros(1, 3, 6)
    other[:, : min(3, tokens)] = b[0][:, :3]
    assert torch.allclose(text, 0.25 * a[0] + 0.75 * other, atol=1e-6)
    pooled = 0.25 * a[1]["pooled_output"] + 0.75 * b[1]["pooled_output"]
    assert torch.allclose(options["pooled_output"], pooled, atol=1e-6)
    assert options["guidance"] == 2.0


def test_averaging_with_a_text_without_pooled_state_keeps_the_own() -> None:
    a, b = entry(3, 0), entry(3, 1, pooled_output=None)
    ((_, options),) = conditioning.average([a], [(b[0], {"pooled_output": None})], 0.25)
    assert torch.equal(options["pooled_output"], a[1]["pooled_output"])


def test_two_prompts_go_to_an_encoder_each(small_models: Path) -> None:
    checkpoint = TensorFile.open(small_models / "checkpoints" / "flux1-dev-fp8.safetensors")
    clip = ClipHandle(checkpoint.component("clip_l"), checkpoint.component("t5"))
    context: Any = SimpleNamespace(library=ModelLibrary(Placement.choose("cpu", "fp32")))
    ((cat, cat_options),) = conditioning.encode_text("a cat", clip, context=context)
    ((dog, dog_options),) = conditioning.encode_text("a dog", clip, context=context)
    ((text, options),) = conditioning.encode_text_flux(clip, "a dog", "a cat", 1.5, context=context)
    assert torch.equal(text, cat)
    assert torch.equal(options["pooled_output"], dog_options["pooled_output"])
    assert options["guidance"] == 1.5
    assert not torch.equal(cat, dog)
    assert not torch.equal(cat_options["pooled_output"], dog_options["pooled_output"])

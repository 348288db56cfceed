"""Previews: fitted once for a VAE, by the CPU, and never in the way of a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from usoflow.errors import UsoflowError
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.service.preview import Previewer
from usoflow.settings import find_folders
from usoflow.workflow.prompt import Prompt, PromptNode


def previewer_of(models: Path, placement: Placement) -> Previewer:
    previewer = Previewer(ModelLibrary(placement))
    loader = PromptNode("CheckpointLoaderSimple", {"ckpt_name": "flux1-dev-fp8.safetensors"})
    previewer.choose(Prompt({"1": loader}), find_folders(models=models))
    return previewer


def test_a_run_that_is_stopped_while_a_preview_is_prepared_stops(small_models: Path) -> None:
    """And the next one has previews."""
    previewer = previewer_of(small_models, Placement(torch.device("cpu"), torch.float32))

    def stop() -> None:
        raise UsoflowError("cancelled", "enough")

    previewer.library.begin_run(stop)
    with pytest.raises(UsoflowError, match="enough"):
        previewer.jpeg(torch.zeros(1, 16, 8, 8))
    previewer.library.begin_run()
    with Image.open(io.BytesIO(previewer.jpeg(torch.zeros(1, 16, 8, 8)))) as picture:
        assert picture.format == "JPEG"


def test_on_a_gpu_no_model_makes_room_for_a_preview(
    small_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without values stands for the GPU; the CPU fits the map."""
    previewer = previewer_of(small_models, Placement(torch.device("meta"), torch.bfloat16))
    monkeypatch.setattr(Placement, "fits", lambda self, needed: False)
    monkeypatch.setattr(ModelLibrary, "_forget_transformers", lambda self: pytest.fail("it was forgotten"))
    assert previewer.jpeg(torch.zeros(1, 16, 8, 8))

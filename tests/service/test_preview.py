"""Previews: fitted once for a VAE, by the CPU, and never in the way of a run."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from small import text_to_image, with_inputs
from usoflow.errors import UsoflowError
from usoflow.execution.executor import Executor
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.nodes import registry
from usoflow.service.preview import Previewer, vae_of
from usoflow.settings import find_folders
from usoflow.workflow.prompt import Prompt, PromptNode


def previewer_of(models: Path, placement: Placement) -> Previewer:
    previewer = Previewer(ModelLibrary(placement))
    loader = PromptNode("CheckpointLoaderSimple", {"ckpt_name": "flux1-dev-fp8.safetensors"})
    previewer.choose([loader], find_folders(models=models))
    return previewer


def test_a_loader_that_no_output_needs_is_not_asked(small_models: Path, tmp_path: Path) -> None:
    for folder in ("checkpoints", "vae"):
        shutil.copytree(small_models / "checkpoints", tmp_path / folder)
    name = "flux1-dev-fp8.safetensors"
    stray = {"class_type": "VAELoader", "inputs": {"vae_name": name, "strange": ["nobody", 0]}}
    executor = Executor(registry(), ModelLibrary(Placement(torch.device("cpu"), torch.float32)))
    prompt = text_to_image() | {"stray": stray}
    for origin, folder in ((["loader", 2], "checkpoints"), (["stray", 0], "vae")):
        parsed = Prompt.parse(with_inputs(prompt, "decode", vae=origin))
        found = vae_of(executor.needed(parsed, ["save"]), find_folders(models=tmp_path))
        assert found is not None
        assert found.file.path == tmp_path / folder / name


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

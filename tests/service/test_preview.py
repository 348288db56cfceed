"""Previews: fitted once for a VAE, by the CPU, and never in the way of a run."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from small import text_to_image, with_inputs
from usoflow.errors import UsoflowError
from usoflow.execution.executor import Executor
from usoflow.models.checkpoint import TensorFile
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.nodes import registry
from usoflow.service import preview
from usoflow.service.preview import Previewer, colours, fit, vae_of
from usoflow.settings import POCKET_MODELS, find_folders
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


def test_the_map_gives_the_colours_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pocket's VAE: a picture that the map was not fitted on, seen in its latent."""
    file = TensorFile.open(POCKET_MODELS / "checkpoints" / "usoflow-pocket.safetensors")
    library, vae = ModelLibrary(Placement(torch.device("cpu"), torch.float32)), file.component("vae")
    side = torch.linspace(0, 1, 128)
    red, green = torch.meshgrid(side, side, indexing="ij")
    picture = torch.stack([red, green, torch.full_like(red, 0.3)], dim=-1)[None]  # [1, 128, 128, 3]
    latent = library.vae_encode_once(vae, picture)
    wanted = torch.nn.functional.avg_pool2d(picture.permute(0, 3, 1, 2), 8)[0].permute(1, 2, 0)
    weights = fit(library, vae)
    shown = torch.from_numpy(colours(latent[0], weights)).float() / 255
    assert shown.shape == (16, 16, 3)
    assert float((shown - wanted).abs().mean()) < 0.06
    fitted: list[object] = []
    monkeypatch.setattr(preview, "fit", lambda *asked: fitted.append(asked) or weights)
    monkeypatch.setattr(preview, "PERIOD", 0.0)
    previewer = Previewer(library)
    loader = PromptNode("CheckpointLoaderSimple", {"ckpt_name": file.path.name})
    previewer.choose([loader], find_folders(models=POCKET_MODELS))
    for _ in range(2):
        with Image.open(io.BytesIO(previewer.jpeg(latent))) as jpeg:
            assert jpeg.size == (128, 128)
            seen = torch.tensor(np.asarray(jpeg.resize((16, 16), Image.Resampling.BOX))).float() / 255
        assert float((seen - wanted).abs().mean()) < 0.08
    assert len(fitted) == 1


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

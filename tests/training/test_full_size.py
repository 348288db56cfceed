"""USO's stages on FLUX.1's own files: the loss falls, the base is never changed, results load as usual."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from accelerate import Accelerator

from discs import WORLD, paint_sprites
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.library import load_flux, load_projector
from usoflow.models.lora import attach
from usoflow.training.full_size import OUTPUT, StageName, Task, run
from usoflow.training.loop import Recipe
from usoflow.training.plan import Plan
from usoflow.training.reward import RewardStage
from usoflow.training.stages import Workshop


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A work folder with drawings."""
    paint_sprites(tmp_path / "sprites")
    plan = Plan.read(None)
    return Workshop(
        tmp_path, dataclasses.replace(plan, reward=RewardStage(Recipe(64, 8, 1e-3), drawn=16)), world=WORLD
    )


def task(
    name: StageName, models: Path, workshop: Workshop, *, fp8: bool, samples: int = 12, rate: float = 3e-3
) -> Task:
    recipe = Recipe(samples, 2, rate, warmup=0, steady=1.0)
    return Task(name, models, workshop, 64, fp8, lessons=2, style_tokens=4, rank=8, recipe=recipe)


@pytest.mark.parametrize("fp8", [False, True])
def test_both_stages_learn_beside_a_frozen_base(small_models: Path, workshop: Workshop, fp8: bool) -> None:
    accelerator = Accelerator(cpu=True)
    for name in ("style", "subject"):
        losses = run(task(name, small_models, workshop, fp8=fp8, samples=60), accelerator)
        assert sum(losses[-10:]) < sum(losses[:10])
    load_projector(TensorFile.open(workshop.folder / OUTPUT["style"]).component("uso_projector"))
    checkpoint = small_models / "checkpoints" / "flux1-dev-fp8.safetensors"
    flux = load_flux(TensorFile.open(checkpoint).component("flux"))
    attach(flux, TensorFile.open(workshop.folder / OUTPUT["subject"]).component("uso_lora"), 1.0)


def test_a_stage_continues_where_it_was(small_models: Path, workshop: Workshop) -> None:
    """As if it had not been interrupted; and not with other settings."""
    accelerator = Accelerator(cpu=True)
    first = run(task("style", small_models, workshop, fp8=False, samples=4), accelerator)
    second = run(task("style", small_models, workshop, fp8=False, samples=8), accelerator)
    (workshop.folder / "style.pt").unlink()
    whole = run(task("style", small_models, workshop, fp8=False, samples=8), accelerator)
    assert [*first, *second] == pytest.approx(whole, rel=1e-5)
    assert run(task("style", small_models, workshop, fp8=False, samples=8), accelerator) == []
    wider = dataclasses.replace(task("style", small_models, workshop, fp8=True), style_tokens=8)
    with pytest.raises(UsoflowError, match="other settings: fp8, style_tokens"):
        run(wider, accelerator)


def test_subject_needs_style(small_models: Path, workshop: Workshop) -> None:
    with pytest.raises(UsoflowError, match="run the stage style first"):
        run(task("subject", small_models, workshop, fp8=False), Accelerator(cpu=True))


@pytest.mark.full
@pytest.mark.parametrize("fp8", [False, True])
def test_official_width(synth_models: Path, workshop: Workshop, fp8: bool) -> None:
    """FLUX.1's width, few blocks: the same two lessons again and again are learnt."""
    name = "flux1-dev-fp8.safetensors"
    assert (synth_models / "checkpoints" / name).exists()
    for stage in ("style", "subject"):
        losses = run(task(stage, synth_models, workshop, fp8=fp8, rate=1e-3), Accelerator(cpu=True))
        assert min(losses[3:]) < losses[0]

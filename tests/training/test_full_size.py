"""USO's stages on FLUX.1's own files: the loss falls, the base is never changed, results load as usual."""

from __future__ import annotations

import dataclasses
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from discs import WORLD, paint_sprites
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_flux, load_projector
from usoflow.models.lora import attach
from usoflow.models.placement import Placement
from usoflow.training.full_size import OUTPUT, FullBase, StageName, Step, Task, learn, main, recomputed, run
from usoflow.training.loop import Recipe
from usoflow.training.lora import add_lora, lora_parameters
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
    name: StageName,
    models: Path | None,
    workshop: Workshop,
    *,
    fp8: bool,
    samples: int = 12,
    rate: float = 3e-3,
) -> Task:
    recipe = Recipe(samples, 2, rate, warmup=0, steady=1.0)
    return Task(name, models, workshop, 64, fp8, lessons=2, style_tokens=4, rank=8, recipe=recipe)


STILL = 1e-12  # a rate at which nothing is learnt


def fall(name: StageName, models: Path, workshop: Workshop, *, samples: int, rate: float, fp8: bool) -> float:
    """By which part the losses of the second half of a run lie below those of one that learns nothing.

    Both see the same lessons at the same noise levels.
    """
    ends = []
    for speed in (STILL, rate):
        (workshop.folder / f"{name}.pt").unlink(missing_ok=True)
        asked = task(name, models, workshop, fp8=fp8, samples=samples, rate=speed)
        losses = run(asked, Accelerator(cpu=True))
        ends.append(sum(losses[len(losses) // 2 :]))
    return 1 - ends[1] / ends[0]


@pytest.mark.parametrize("fp8", [False, True])
def test_both_stages_learn_beside_a_frozen_base(
    small_models: Path, workshop: Workshop, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[tuple[FullBase, dict[str, torch.Tensor]]] = []
    read = FullBase.read

    def noticed(*given: Any, **more: Any) -> FullBase:
        base = read(*given, **more)
        bases.append((base, {name: p.detach().clone() for name, p in base.flux.named_parameters()}))
        return base

    monkeypatch.setattr(FullBase, "read", noticed)
    for name, least in (("style", 0.02), ("subject", 0.2)):
        assert fall(name, small_models, workshop, samples=60, rate=3e-3, fp8=fp8) > least
    assert len(bases) == 4
    for base, before in bases:
        now = dict(base.flux.named_parameters())
        assert all(
            torch.equal(now[name].view(torch.uint8), value.view(torch.uint8))
            for name, value in before.items()
        )
    load_projector(TensorFile.open(workshop.folder / OUTPUT["style"]).component("uso_projector"))
    checkpoint = small_models / "checkpoints" / "flux1-dev-fp8.safetensors"
    flux = load_flux(TensorFile.open(checkpoint).component("flux"))
    attach(flux, TensorFile.open(workshop.folder / OUTPUT["subject"]).component("uso_lora"), 1.0)


def test_a_stage_continues_where_it_was(
    small_models: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if it had not been interrupted; and not with other settings."""
    accelerator = Accelerator(cpu=True)
    first = run(task("style", small_models, workshop, fp8=False, samples=4), accelerator)
    assert f"Read: {small_models / 'checkpoints' / 'flux1-dev-fp8.safetensors'}, " in capsys.readouterr().out
    state = torch.load(workshop.folder / "style.pt", weights_only=True)
    vectors = sum(value.ndim == 1 for value in state["step"].values())
    groups = [(group["weight_decay"], len(group["params"])) for group in state["optimiser"]["param_groups"]]
    assert groups == [(0.01, len(state["step"]) - vectors), (0.0, vectors)]
    assert vectors > 0
    second = run(task("style", small_models, workshop, fp8=False, samples=8), accelerator)
    (workshop.folder / "style.pt").unlink()
    whole = run(task("style", small_models, workshop, fp8=False, samples=8), accelerator)
    assert [*first, *second] == pytest.approx(whole, rel=1e-5)
    assert run(task("style", small_models, workshop, fp8=False, samples=8), accelerator) == []
    wider = dataclasses.replace(task("style", small_models, workshop, fp8=True), style_tokens=8)
    with pytest.raises(UsoflowError, match="other settings: fp8, style_tokens"):
        run(wider, accelerator)


def test_a_run_goes_on_beside_models_in_another_place_and_at_another_rate(
    small_models: Path, workshop: Workshop, tmp_path: Path
) -> None:
    run(task("style", small_models, workshop, fp8=False, samples=4), Accelerator(cpu=True))
    moved = shutil.copytree(small_models, tmp_path / "moved", copy_function=shutil.copyfile)
    asked = task("style", moved, workshop, fp8=False, samples=8, rate=1e-3)
    assert len(run(asked, Accelerator(cpu=True))) == 2
    file = moved / "checkpoints" / "flux1-dev-fp8.safetensors"
    name = "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"
    with file.open("r+b") as stream:
        stream.seek(TensorFile.open(file).tensors[name].start)
        stream.write(b"\x40")
    with pytest.raises(UsoflowError, match="other settings: flux"):
        run(asked, Accelerator(cpu=True))


def test_what_is_distilled_is_not_unlearnt(
    small_models: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The straight velocity is taught as the answer at a guidance of 1."""
    asked: list[float] = []
    velocity = FullBase.velocity

    def noticed(self: FullBase, *given: Any, guidance: float, **more: Any) -> torch.Tensor:
        asked.append(guidance)
        return velocity(self, *given, guidance=guidance, **more)

    monkeypatch.setattr(FullBase, "velocity", noticed)
    for name in ("style", "subject"):
        run(task(name, small_models, workshop, fp8=False, samples=4), Accelerator(cpu=True))
    assert asked == [1.0] * 4


def test_blocks_that_are_computed_again_have_the_same_gradients(small_models: Path) -> None:
    component = TensorFile.open(small_models / "checkpoints" / "flux1-dev-fp8.safetensors").component("flux")
    gradients = []
    for again in (False, True):
        library = ModelLibrary(Placement(torch.device("cpu"), torch.float32))
        flux = library.flux(component, (), "default")
        if again:
            recomputed(flux)
        learned = lora_parameters(add_lora(flux, 4, 0, seed=0))
        with torch.no_grad():
            for parameter in learned.values():  # else the upper halves are zero, and so the lower's gradients
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 8)
        config, random = flux.config, torch.Generator().manual_seed(2)
        latent = torch.randn(1, config.channels, 8, 8, generator=random)
        text = torch.randn(1, 4, config.text_dim, generator=random)
        pooled = torch.randn(1, config.pooled_dim, generator=random)
        inputs = flux.prepare(text, pooled, (8, 8), dtype=torch.float32)
        flux(latent, torch.tensor([0.5]), inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in learned.values()])
    for plain, computed in zip(*gradients, strict=True):
        assert torch.allclose(plain, computed, rtol=1e-5, atol=1e-8)
        assert plain.any()


def test_subject_needs_style(small_models: Path, workshop: Workshop) -> None:
    with pytest.raises(UsoflowError, match="The stage style was not run"):
        run(task("subject", small_models, workshop, fp8=False), Accelerator(cpu=True))


def test_the_small_models_of_the_package_are_no_base(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USOFLOW_MODELS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsoflowError, match="only the package's own small models"):
        run(task("style", None, workshop, fp8=False), Accelerator(cpu=True))


@pytest.mark.parametrize("nan", ["loss", "gradient"])
def test_what_is_no_number_is_told_and_not_saved(tmp_path: Path, nan: str) -> None:
    learned = nn.Parameter(torch.ones(2))
    if nan == "gradient":
        learned.register_hook(lambda gradient: gradient * torch.nan)
    step = Step({"a": learned}, lambda done: learned.sum() * (torch.nan if nan == "loss" else 1))
    with pytest.raises(UsoflowError) as error:
        learn(step, Recipe(4, 4, 1e-3), Accelerator(cpu=True), tmp_path / "style.pt", {})
    assert error.value.code == "non_finite"
    assert "lower --rate" in error.value.remedy
    assert not (tmp_path / "style.pt").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--batch=0"], "batch"),
        (["--samples=0"], "samples"),
        (["--lessons=0"], "lessons"),
        (["--rank=0"], "rank"),
        (["--style-tokens=0"], "style_tokens"),
        (["--side=40"], "a multiple of 16, not 40"),
    ],
)
def test_a_wrong_command_is_told(
    wrong: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["style", *wrong])
    assert said in capsys.readouterr().err


def test_a_work_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsoflowError, match="not a folder that can be written to") as caught:
        main(["style", f"--work={tmp_path / 'file'}"])
    assert caught.value.remedy == "Make it one, or choose another with --work."


def test_precision_is_not_that_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate config` was told is in the environment of what it launches."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("usoflow.training.full_size.run", lambda _, accelerator: accelerator.mixed_precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["style", f"--work={tmp_path}"]) == "no"


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.delitem(sys.modules, "usoflow.training.full_size")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("usoflow.training.full_size", run_name="__main__")
    assert caught.value.code == 2
    assert "usoflow[train]" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(("learning", "fp8"), [("style", False), ("subject", True)])
def test_official_width(synth_models: Path, workshop: Workshop, learning: StageName, fp8: bool) -> None:
    """FLUX.1's width, few blocks: both stages run; after two steps the loss of one is lower than without."""
    assert (synth_models / "checkpoints" / "flux1-dev-fp8.safetensors").exists()
    for stage in ("style", "subject"):
        if stage == learning:
            assert fall(stage, synth_models, workshop, samples=8, rate=3e-4, fp8=fp8) > 0.02
        else:
            losses = run(
                task(stage, synth_models, workshop, fp8=fp8, samples=2, rate=3e-4), Accelerator(cpu=True)
            )
            assert len(losses) == 1

"""Whole runs on the full-width transformer against the reference: samplers, guidance, EasyCache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from golden.compare import Golden
from usoflow.models.checkpoint import TensorFile
from usoflow.models.flux import Flux
from usoflow.models.flux_config import FluxConfig
from usoflow.models.latent_format import LatentFormat
from usoflow.models.lora import attach
from usoflow.models.style_projector import StyleProjector, StyleProjectorConfig
from usoflow.models.weights import build
from usoflow.sampling.denoise import sample
from usoflow.sampling.guidance import Guidance
from usoflow.sampling.noise import initial_noise, step_noise
from usoflow.sampling.samplers import SAMPLERS
from usoflow.sampling.schedule import FluxSchedule, sigmas
from usoflow.sampling.step_cache import EasyCacheSettings, StepCache, Velocity

SEED = 42
TOLERANCE = 1e-4
LATENT = LatentFormat()
SCHEDULE = FluxSchedule()


@dataclass(frozen=True)
class Bench:
    """The model of the goldens with its inputs."""

    flux: Flux
    drawn: Callable[..., Tensor]  # the fixture `synthetic`
    style: Tensor  # [1, 192, 3072]

    def velocity(
        self,
        size: tuple[int, int],
        *,
        tag: str = "pos",
        tokens: int = 256,
        batch: int = 1,
        zeroed: bool = False,
        subject: bool = False,
        style: bool = False,
    ) -> Velocity:
        text = self.drawn(f"ks.{tag}.ctx", (1, tokens, 4096), 0.2)
        pooled = self.drawn(f"ks.{tag}.y", (1, 768))
        reference = LATENT.to_model(self.drawn("ref.a", (1, 16, 8, 12), 2.0))
        inputs = self.flux.prepare(
            text * (not zeroed),
            pooled * (not zeroed),
            size,
            batch=batch,
            references=[reference] if subject else [],
            method="uxo",
            style=self.style if style else None,
        )
        return lambda x, sigma: self.flux(x, sigma, inputs)


@pytest.fixture(scope="module")
def bench(synth_models: Path, synthetic: Callable[..., Tensor]) -> Bench:
    def component(file: str, kind: str):
        return TensorFile.open(synth_models / file).component(kind)

    transformer = component("checkpoints/flux1-dev-bf16.safetensors", "flux")
    config = FluxConfig.from_component(transformer)
    flux = build(transformer, lambda: Flux(config))
    attach(flux, component("loras/uso-flux1-dit-lora-v1.safetensors", "uso_lora"), 1.0)
    patch = component("model_patches/uso-flux1-projector-v1.safetensors", "uso_projector")
    patch_config = StyleProjectorConfig.from_component(patch)
    projector = build(patch, lambda: StyleProjector(patch_config))
    states = {
        layer: synthetic(f"sig.a.{level}", (1, 729, 1152), 2.0)
        for level, layer in (("high", -2), ("mid", -11), ("low", -20))
    }
    with torch.no_grad():
        return Bench(flux.float(), synthetic, projector(states))  # widened once, not in every call


def run(
    guidance: Guidance,
    shape: tuple[int, ...],
    *,
    steps: int,
    sampler: str = "euler",
    denoise: float = 1.0,
    latent: Tensor | None = None,
) -> NDArray[np.float32]:
    out = sample(
        guidance,
        SAMPLERS[sampler],
        sigmas("simple", steps, denoise, schedule=SCHEDULE),
        noise=initial_noise(shape, SEED),
        latent=torch.zeros(shape) if latent is None else LATENT.to_model(latent),
        step_noise=step_noise(SEED),
        watch=lambda report: None,
    )
    return LATENT.from_model(out).numpy()


@pytest.mark.parametrize(
    "sampler",
    [name if name == "euler" else pytest.param(name, marks=pytest.mark.full) for name in sorted(SAMPLERS)],
)
def test_samplers(bench: Bench, golden: Callable[[str], Golden], sampler: str) -> None:
    with torch.no_grad():
        velocity = bench.velocity((8, 8), tokens=32)
    out = run(Guidance(velocity), (1, 16, 8, 8), steps=4, sampler=sampler)
    report = golden("samplers").check(sampler, out, TOLERANCE)
    assert report["ok"], report


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "size", "subject", "style"),
    [
        ("16x16.text", (16, 16), False, False),
        ("16x16.subject", (16, 16), True, False),
        ("16x16.style", (16, 16), False, True),
        ("12x20.text", (12, 20), False, False),
    ],
)
def test_ksampler(
    bench: Bench,
    golden: Callable[[str], Golden],
    name: str,
    size: tuple[int, int],
    subject: bool,
    style: bool,
) -> None:
    with torch.no_grad():
        velocity = bench.velocity(size, subject=subject, style=style)
    report = golden("ksampler").check(name, run(Guidance(velocity), (1, 16, *size), steps=4), TOLERANCE)
    assert report["ok"], report


@pytest.mark.full
@pytest.mark.parametrize(("name", "subject"), [("cfg2.text", False), ("cfg2.subject", True)])
def test_cfg(bench: Bench, golden: Callable[[str], Golden], name: str, subject: bool) -> None:
    with torch.no_grad():
        positive = bench.velocity((16, 16), subject=subject)
        negative = bench.velocity((16, 16), tag="neg")
    out = run(Guidance(positive, negative, cfg=2.0), (1, 16, 16, 16), steps=2)
    report = golden("cfg").check(name, out, TOLERANCE)
    assert report["ok"], report


@pytest.mark.full
def test_batch(bench: Bench, golden: Callable[[str], Golden]) -> None:
    with torch.no_grad():
        velocity = bench.velocity((16, 16), batch=2)
    report = golden("cfg").check("batch2.text", run(Guidance(velocity), (2, 16, 16, 16), steps=2), TOLERANCE)
    assert report["ok"], report


@pytest.mark.full
def test_image_to_image(bench: Bench, golden: Callable[[str], Golden]) -> None:
    with torch.no_grad():
        velocity = bench.velocity((16, 16))
    latent = bench.drawn("ks.lat", (1, 16, 16, 16), 2.0)
    out = run(Guidance(velocity), (1, 16, 16, 16), steps=2, denoise=0.5, latent=latent)
    report = golden("cfg").check("img2img.denoise0.5", out, TOLERANCE)
    assert report["ok"], report


@pytest.mark.parametrize(
    ("name", "threshold"),
    [pytest.param("thr0.2", 0.2, marks=pytest.mark.full), ("thr1.0.noalias", 1.0)],
)
def test_easy_cache(bench: Bench, golden: Callable[[str], Golden], name: str, threshold: float) -> None:
    with torch.no_grad():
        velocity = bench.velocity((16, 16), tokens=32)
    cache = StepCache(EasyCacheSettings(threshold), SCHEDULE)
    out = run(Guidance(velocity, step_cache=cache), (1, 16, 16, 16), steps=20)
    reference = golden("easycache")
    report = reference.check(name, out, TOLERANCE)
    assert report["ok"], report
    decisions = cache.report.decisions[:-1]  # the reference does not record the step after the window
    assert [int(decision.skipped) for decision in decisions] == reference.z[f"{name}.skip_or_run"].tolist()
    cumulative = [decision.cumulative for decision in decisions]
    assert cumulative == pytest.approx(reference.z[f"{name}.cum"].tolist(), abs=1e-4)

"""Sampling taken apart equals sampling in one; masks and time ranges against loops written out here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.nodes import conditioning, custom_sampling, latent_batch, sampling, uso
from usoflow.nodes.handles import ClipHandle, ModelHandle, ModelPatchHandle
from usoflow.sampling.schedule import FluxSchedule, resolution_shift, sigmas, window

SCALE, SHIFT = 0.3611, 0.1159  # FLUX's latent format
Tools = SimpleNamespace


@pytest.fixture(scope="module")
def tools(small_models: Path) -> Tools:
    checkpoint = TensorFile.open(small_models / "checkpoints" / "flux1-dev-fp8.safetensors")
    library = ModelLibrary(Placement.choose("cpu", "fp32"))
    context: Any = SimpleNamespace(library=library, report=lambda *_: None)
    clip = ClipHandle(checkpoint.component("clip_l"), checkpoint.component("t5"))
    texts = [conditioning.encode_text(text, clip, context=context) for text in ("a cat", "rain at night")]
    model = ModelHandle(checkpoint.component("flux"))
    return SimpleNamespace(context=context, model=model, cat=texts[0], rain=texts[1])


def latents(seed: int, batch: int = 1) -> dict[str, Any]:
    return {"samples": torch.randn(batch, 16, 4, 6, generator=torch.Generator().manual_seed(seed))}


def empty() -> dict[str, Any]:
    return {"samples": torch.zeros(1, 16, 4, 6)}


def whole(tools: Tools, latent: dict[str, Any], *, cfg: float = 1.0, denoise: float = 1.0) -> Tensor:
    result = sampling.k_sampler(
        tools.model, 5, 4, cfg, sampler_name="euler", scheduler="simple", positive=tools.cat,
        negative=tools.rain, latent_image=latent, denoise=denoise, context=tools.context,
    )  # fmt: skip
    return result["samples"]


def in_parts(tools: Tools, guider: Any, latent: dict[str, Any], *, denoise: float = 1.0) -> tuple[Any, Any]:
    levels = custom_sampling.basic_scheduler(tools.model, "simple", 4, denoise)
    return custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(5), guider, custom_sampling.select_sampler("euler"), levels, latent,
        context=tools.context,
    )  # fmt: skip


def velocity(tools: Tools, x: Tensor, sigma: float, text: Any) -> Tensor:
    """The transformer asked directly."""
    flux = tools.context.library.flux(tools.model.flux, (), "default")
    ((states, options),) = text
    with torch.no_grad():
        return flux(x, torch.tensor(sigma), flux.prepare(states, options["pooled_output"], (4, 6)))


def noise(seed: int) -> Tensor:
    return torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_apart_is_the_same_as_in_one(tools: Tools, denoise: float) -> None:
    guider = custom_sampling.basic_guider(tools.model, tools.cat)
    output, estimate = in_parts(tools, guider, latents(0), denoise=denoise)
    assert torch.equal(output["samples"], whole(tools, latents(0), denoise=denoise))
    assert torch.allclose(estimate["samples"], output["samples"], atol=1e-5)


def test_apart_with_guidance_is_the_same_as_in_one(tools: Tools) -> None:
    guider = custom_sampling.cfg_guider(tools.model, tools.cat, tools.rain, 2.5)
    output, _ = in_parts(tools, guider, empty())
    assert torch.equal(output["samples"], whole(tools, empty(), cfg=2.5))
    assert not torch.allclose(output["samples"], whole(tools, empty()), atol=1e-3)


def test_two_halves_with_leftover_noise_are_one_run(tools: Tools) -> None:
    def part(latent: dict[str, Any], add: str, first: int, last: int, leftover: str) -> dict[str, Any]:
        return sampling.k_sampler_advanced(
            tools.model, add, 5, 4, 1.0, sampler_name="euler", scheduler="simple", positive=tools.cat,
            negative=tools.rain, latent_image=latent, start_at_step=first, end_at_step=last,
            return_with_leftover_noise=leftover, context=tools.context,
        )  # fmt: skip

    half = part(latents(0), "enable", 0, 2, "enable")
    joined = part(half, "disable", 2, 10000, "disable")
    assert torch.allclose(joined["samples"], whole(tools, latents(0)), atol=1e-4)
    assert not torch.allclose(half["samples"], joined["samples"], atol=1e-2)
    assert torch.equal(part(latents(0), "enable", 4, 10000, "disable")["samples"], latents(0)["samples"])


def test_windows_of_levels() -> None:
    levels = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    assert torch.equal(window(levels, 1, 3, leftover=True), levels[1:4])
    assert torch.equal(window(levels, 1, 3, leftover=False), torch.tensor([0.8, 0.5, 0.0]))
    assert torch.equal(window(levels, 0, 99, leftover=False), levels)
    assert len(window(levels, 4, 99, leftover=False)) == 0


def test_splitting_levels_shares_the_one_between() -> None:
    levels = torch.tensor([1.0, 0.8, 0.5, 0.0])
    high, low = custom_sampling.split_sigmas(levels, 2)
    assert (high.tolist(), low.tolist()) == (levels[:3].tolist(), levels[2:].tolist())


def test_without_noise_the_latent_only_loses_what_the_model_takes(tools: Tools) -> None:
    """One step of Euler from the scaled latent, written out."""
    levels = torch.tensor([0.5, 0.0])
    output, _ = custom_sampling.sampler_custom_advanced(
        custom_sampling.disable_noise(), custom_sampling.basic_guider(tools.model, tools.cat), "euler",
        levels, latents(0), context=tools.context,
    )  # fmt: skip
    x = 0.5 * (latents(0)["samples"] - SHIFT) * SCALE
    expected = x - 0.5 * velocity(tools, x, 0.5, tools.cat)
    assert torch.allclose(output["samples"], expected / SCALE + SHIFT, atol=1e-4)


def test_an_interrupted_run_also_gives_its_estimate(tools: Tools) -> None:
    levels = torch.tensor([0.9, 0.6])
    output, estimate = custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(3), custom_sampling.basic_guider(tools.model, tools.cat), "euler",
        levels, empty(), context=tools.context,
    )  # fmt: skip
    x = 0.9 * noise(3)
    v = velocity(tools, x, 0.9, tools.cat)
    assert torch.allclose(estimate["samples"], (x - 0.9 * v) / SCALE + SHIFT, atol=1e-4)
    assert torch.allclose(output["samples"], (x - 0.3 * v) / (1 - 0.6) / SCALE + SHIFT, atol=1e-4)


def test_of_more_reference_latents_than_latents_the_first_count(tools: Tools) -> None:
    """An animated picture as the subject."""
    frames = latents(1, batch=3)
    made = []
    for reference in (frames, {"samples": frames["samples"][:1]}):
        text = conditioning.reference_latent(tools.cat, reference)
        made.append(whole(SimpleNamespace(**vars(tools) | {"cat": text}), empty()))
    assert torch.equal(*made)


def test_of_more_style_pictures_than_latents_the_first_count(tools: Tools, small_models: Path) -> None:
    """An animated picture as the style."""
    patch, tower = (next((small_models / name).iterdir()) for name in ("model_patches", "clip_vision"))
    siglip = TensorFile.open(tower).component("siglip")
    frames = torch.rand(3, 8, 8, 3)
    projector = ModelPatchHandle(TensorFile.open(patch).component("uso_projector"))
    made = []
    for pictures in (frames, frames[:1]):
        seen = tools.context.library.encode_vision(siglip, pictures, "center")
        styled = uso.style_reference(tools.model, projector, seen)
        made.append(whole(SimpleNamespace(**vars(tools) | {"model": styled}), empty()))
    assert torch.allclose(*made, atol=1e-5)


def test_only_what_is_in_the_mask_is_made_anew(tools: Tools) -> None:
    """Two steps of Euler written out, with a mask that is 1 on the left, 0 on the right."""
    mask = torch.zeros(1, 32, 48)
    mask[..., :24] = 1
    masked = latent_batch.set_noise_mask(latents(0), mask)
    guider = custom_sampling.basic_guider(tools.model, tools.cat)
    levels = torch.tensor([0.8, 0.4, 0.0])
    output, _ = custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(5), guider, "euler", levels, masked, context=tools.context
    )
    known = (latents(0)["samples"] - SHIFT) * SCALE
    left = torch.zeros(1, 1, 4, 6)
    left[..., :3] = 1
    x = 0.8 * noise(5) + 0.2 * known
    for sigma, following in ((0.8, 0.4), (0.4, 0.0)):
        seen = left * x + (1 - left) * (sigma * noise(5) + (1 - sigma) * known)
        estimate = left * (seen - sigma * velocity(tools, seen, sigma, tools.cat)) + (1 - left) * known
        x = estimate + following / sigma * (x - estimate)
    assert torch.allclose(output["samples"], x / SCALE + SHIFT, atol=1e-4)
    assert torch.allclose(output["samples"][..., 3:], latents(0)["samples"][..., 3:], atol=1e-5)
    assert not torch.allclose(output["samples"][..., :3], latents(0)["samples"][..., :3], atol=1e-2)
    as_custom_nodes_have_it = {**masked, "noise_mask": mask[:, None]}
    again, _ = custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(5),
        guider,
        "euler",
        levels,
        as_custom_nodes_have_it,
        context=tools.context,
    )
    assert torch.equal(again["samples"], output["samples"])


@pytest.mark.parametrize("masks", [2, 4])
def test_several_masks_are_for_the_latents_in_turn(tools: Tools, masks: int) -> None:
    """As many as there are latents, or not."""
    planes = torch.rand(masks, 32, 48, generator=torch.Generator().manual_seed(0)).round()
    batch = latent_batch.repeat_batch(latents(0), 3)
    found = whole(tools, latent_batch.set_noise_mask(batch, planes))
    chosen = torch.stack([planes[n % masks] for n in range(3)])
    assert torch.equal(found, whole(tools, latent_batch.set_noise_mask(batch, chosen)))
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_a_latent_of_a_batch_keeps_its_noise(tools: Tools) -> None:
    batch = whole(tools, {"samples": torch.zeros(3, 16, 4, 6)})
    third = latent_batch.from_batch({"samples": torch.zeros(3, 16, 4, 6)}, 2, 1)
    assert torch.allclose(whole(tools, third), batch[2:], atol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_easy_cache_with_guidance(tools: Tools, cfg: float) -> None:
    """The rule written out: the positive velocity decides, and each reuses its own difference from x.

    A step is skipped while the predicted changes of the velocity, summed up, stay below the threshold.
    """
    threshold, steps = 0.9, 12
    model = uso.easy_cache(tools.model, threshold, 0.0, 1.0)
    result = sampling.k_sampler(
        model, 5, steps, cfg, sampler_name="euler", scheduler="simple", positive=tools.cat,
        negative=tools.rain, latent_image=empty(), context=tools.context,
    )["samples"]  # fmt: skip
    levels = sigmas("simple", steps, 1.0, schedule=FluxSchedule()).tolist()
    x, total, skipped, last, rate = noise(5), 0.0, 0, None, None
    for sigma, following in pairwise(levels):
        here = x[..., ::8, ::8]
        if last is not None and rate is not None:
            total += rate * float((here - last.x).abs().mean()) / last.scale
        if last is not None and rate is not None and total < threshold:
            skipped += 1
            velocities = [x + difference for difference in last.differences]
        else:
            total = 0.0
            velocities = [velocity(tools, x, sigma, text) for text in (tools.cat, tools.rain)]
            there = velocities[0][..., ::8, ::8]
            if last is not None:
                rate = float((there - last.v).abs().mean() / (here - last.x).abs().mean())
            last = SimpleNamespace(
                x=here,
                v=there,
                scale=float(velocities[0].abs().mean()),
                differences=[v - x for v in velocities],
            )
        positive, negative = (x - sigma * v for v in velocities)
        estimate = positive if cfg == 1 else negative + cfg * (positive - negative)
        x = estimate + following / sigma * (x - estimate)
    assert 0 < skipped < steps - 2
    assert torch.allclose(result, x / SCALE + SHIFT, atol=1e-3)


def test_time_ranges_hand_over_at_their_sigma(tools: Tools) -> None:
    """The cat until half of the run, then the rain; the level of one half is the first of the rain."""
    cat = conditioning.set_timestep_range(tools.cat, 0.0, 0.499)
    rain = conditioning.set_timestep_range(tools.rain, 0.5, 1.0)
    middle = FluxSchedule().percent_to_sigma(0.5)
    levels = torch.tensor([1.0, 0.9, middle, 0.0])
    guider = custom_sampling.basic_guider(tools.model, conditioning.combine(cat, rain))
    output, _ = custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(5), guider, "euler", levels, empty(), context=tools.context
    )
    x = noise(5)
    for sigma, following, text in (
        (1.0, 0.9, tools.cat),
        (0.9, middle, tools.cat),
        (middle, 0.0, tools.rain),
    ):
        x = x + (following - sigma) * velocity(tools, x, sigma, text)
    assert torch.allclose(output["samples"], x / SCALE + SHIFT, atol=1e-4)


def test_combined_conditionings_are_averaged(tools: Tools) -> None:
    guider = custom_sampling.basic_guider(tools.model, conditioning.combine(tools.cat, tools.rain))
    output, _ = custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(5),
        guider,
        "euler",
        torch.tensor([1.0, 0.0]),
        empty(),
        context=tools.context,
    )
    mean = (velocity(tools, noise(5), 1.0, tools.cat) + velocity(tools, noise(5), 1.0, tools.rain)) / 2
    assert torch.allclose(output["samples"], (noise(5) - mean) / SCALE + SHIFT, atol=1e-4)


def test_where_nothing_is_asked_for_the_estimate_is_the_zero_latent(tools: Tools) -> None:
    late = conditioning.set_timestep_range(tools.cat, 0.9, 1.0)
    _, estimate = custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(5), custom_sampling.basic_guider(tools.model, late), "euler",
        torch.tensor([1.0, 0.9]), empty(), context=tools.context,
    )  # fmt: skip
    assert torch.allclose(estimate["samples"], torch.full((1, 16, 4, 6), SHIFT), atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(256, 256, 0.5), (1024, 1024, 1.15), (512, 512, 0.63), (2048, 1024, 1.8433333)],
)
def test_shift_of_a_resolution(width: int, height: int, expected: float) -> None:
    """Flux's line through (256 tokens, 0.5) and (4096 tokens, 1.15)."""
    assert resolution_shift(width, height, base=0.5, most=1.15) == pytest.approx(expected)


def test_the_shift_of_the_handle_is_that_of_the_schedule(tools: Tools) -> None:
    model = custom_sampling.model_sampling_flux(tools.model, 1.15, 0.5, 512, 512)
    levels = custom_sampling.basic_scheduler(model, "simple", 4, 1.0)
    factor = math.exp(0.63)
    expected = [factor / (factor + 1 / t - 1) for t in (1.0, 0.75, 0.5, 0.25)] + [0.0]
    assert levels.tolist() == pytest.approx(expected, abs=1e-6)
    assert replace(model, shift=None) != model


def test_the_seed_of_a_later_part_decides_its_step_noise(tools: Tools) -> None:
    """`disable` is about the noise at the beginning; a stochastic sampler still adds some."""

    def later(seed: int) -> Tensor:
        return sampling.k_sampler_advanced(
            tools.model, "disable", seed, 4, 1.0, sampler_name="euler_ancestral", scheduler="simple",
            positive=tools.cat, negative=tools.rain, latent_image=latents(0), start_at_step=1,
            end_at_step=10000, return_with_leftover_noise="disable", context=tools.context,
        )["samples"]  # fmt: skip

    assert torch.equal(later(1), later(1))
    assert not torch.allclose(later(1), later(2), atol=1e-3)


def test_a_files_own_latent_format_is_used(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer sees the same; what leaves it is scaled and shifted as the file declares."""
    official = whole(tools, empty())
    declared, asked = {"scale": 0.5, "shift": -0.25}, Component.setting
    monkeypatch.setattr(
        Component, "setting", lambda *given: declared[given[1]] if given[1] in declared else asked(*given)
    )
    assert torch.allclose((whole(tools, empty()) + 0.25) * 0.5, (official - SHIFT) * SCALE, atol=1e-5)


def test_a_transformer_without_guidance_has_schnells_schedule(tools: Tools, tmp_path: Path) -> None:
    """BFL's `get_schedule(..., shift=(name != "flux-schnell"))`: four equal steps."""
    file = tools.model.flux.file.path
    named = {name: tensor for name, tensor in load_file(file).items() if "guidance_in" not in name}
    with safe_open(file, "pt") as opened:
        declared = json.loads((opened.metadata() or {}).get("usoflow.config", "{}"))
    save_file(named, tmp_path / "schnell.safetensors", {"usoflow.config": json.dumps(declared)})
    model = ModelHandle(TensorFile.open(tmp_path / "schnell.safetensors").component("flux"))
    levels = custom_sampling.basic_scheduler(model, "simple", 4)
    assert torch.allclose(levels, torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert custom_sampling.basic_scheduler(tools.model, "simple", 4)[1] > 0.9


def test_the_scheduler_node_gives_no_more_levels_than_steps(tools: Tools) -> None:
    assert len(sigmas("ddim_uniform", 30, 1.0, schedule=FluxSchedule())) == 32
    assert len(custom_sampling.basic_scheduler(tools.model, "ddim_uniform", 30)) == 31


def one_step(tools: Tools, text: Any, **given: Any) -> tuple[Tensor, Tensor]:
    """One step of Euler by the nodes; and by the transformer, prepared with what is given."""
    output, _ = custom_sampling.sampler_custom_advanced(
        custom_sampling.random_noise(5), custom_sampling.basic_guider(tools.model, text), "euler",
        torch.tensor([1.0, 0.0]), empty(), context=tools.context,
    )  # fmt: skip
    flux = tools.context.library.flux(tools.model.flux, (), "default")
    ((states, options),) = tools.cat
    with torch.no_grad():
        inputs = flux.prepare(states, options["pooled_output"], (4, 6), **given)
        expected = noise(5) - flux(noise(5), torch.tensor(1.0), inputs)
    return output["samples"], expected / SCALE + SHIFT


def test_references_are_seen_in_the_models_scale(tools: Tools) -> None:
    text = conditioning.reference_latent(tools.cat, latents(1))
    references = [(latents(1)["samples"] - SHIFT) * SCALE]
    assert torch.allclose(*one_step(tools, text, references=references), atol=1e-4)


def test_without_guidance_the_model_is_not_told_any(tools: Tools) -> None:
    found = one_step(tools, conditioning.disable_guidance(tools.cat), guidance=None)
    assert torch.allclose(*found, atol=1e-4)


def test_previews_are_in_the_vaes_scale(tools: Tools) -> None:
    told: list[Tensor] = []
    context = SimpleNamespace(
        library=tools.context.library, report=lambda step, steps, latent: told.append(latent)
    )
    found = whole(SimpleNamespace(**vars(tools) | {"context": context}), empty())
    assert len(told) == 4
    assert torch.allclose(told[-1], found, atol=1e-4)


def test_a_shift_of_zero_is_a_shift(tools: Tools) -> None:
    levels = custom_sampling.basic_scheduler(replace(tools.model, shift=0.0), "simple", 4)
    assert torch.allclose(levels, torch.tensor([1, 0.75, 0.5, 0.25, 0]))

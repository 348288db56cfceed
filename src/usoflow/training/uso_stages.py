"""The stages that make Pocket USO from the pocket base, on the same work folder.

Each reads what the ones before left there and continues where it was interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from usoflow.models.latent_format import LatentFormat
from usoflow.models.style_projector import StyleProjector
from usoflow.models.vision import SiglipVision
from usoflow.training import autoencoder, package
from usoflow.training.base import Base, Pocket
from usoflow.training.content import ContentEncoder, ContentReward, Subjects, train_content_encoder
from usoflow.training.lessons import LESSON_SEED, Lessons, lesson_sets
from usoflow.training.loop import LossFunction, load_average
from usoflow.training.lora import LoraPair, add_lora, extract, lora_parameters
from usoflow.training.redraw import Pool, Redrawing
from usoflow.training.reward import StyleEncoder, StyleReward, train_style_encoder
from usoflow.training.stages import Workshop
from usoflow.training.tower import train_tower
from usoflow.training.triplets import (
    PICTURED,
    Encoders,
    Use,
    draw_triplet,
    lesson_cast,
    lesson_sheet,
)
from usoflow.training.uso import StageName, Teaching, new_projector
from usoflow.training.uso_judge import train_uso_judge, write_uso_judge

SHOWN = 12  # lessons on a sheet


def tower(workshop: Workshop) -> SiglipVision:
    """Train the vision tower."""
    return train_tower(workshop.sprites, workshop.plan.tower, workshop.folder / "tower", workshop.device)


def redraw(workshop: Workshop) -> None:
    """Teach a copy of the base to draw a given picture anew."""
    stage = workshop.plan.redraw
    sets = lesson_sets(
        _encoders(workshop), workshop.folder, PICTURED, count=stage.lessons, name="redraw-lessons"
    )
    expert, plain = workshop.finished(), workshop.finished().requires_grad_(False)
    tokenizer = plain.stage.tokenizer
    kept, changed = Pool.kept(sets["subject"], tokenizer), Pool.changed(sets["both"], tokenizer)
    redrawing = Redrawing(expert, plain, workshop.large_batches, kept, changed, stage, workshop.dtype)

    def show(stem: str) -> None:
        made = redrawing.sample(np.arange(SHOWN), seed=0)
        _write_lessons(Path(f"{stem}.png"), workshop, made, "both", changed.rows[:SHOWN])

    workshop.train(dict(expert.named_parameters()), stage.recipe, redrawing.loss, "redraw", show, [plain])


def reward(workshop: Workshop) -> StyleEncoder:
    """Train the style encoder of style reward learning."""
    side = workshop.plan.base.large_side
    encoder = train_style_encoder(
        workshop.sprites, workshop.plan.reward, workshop.folder / "reward", side=side
    )
    return encoder.to(workshop.device)


def style(workshop: Workshop) -> None:
    """Style alignment: train the projector on the frozen base."""
    teaching = _teaching(workshop)
    teaching = dataclasses.replace(teaching, plain=teaching.base)
    parameters = dict(teaching.projector.requires_grad_(True).named_parameters())
    _run(workshop, teaching, parameters, "style")


def subject(workshop: Workshop) -> None:
    """Content-style disentanglement: train the LoRA, beside the frozen projector, from what the expert is."""
    plain, expert = workshop.finished().requires_grad_(False), workshop.pocket().requires_grad_(False)
    workshop.load(expert, "redraw")
    teaching = dataclasses.replace(_teaching(workshop), plain=plain, expert=expert)
    _load_projector(workshop, teaching.projector)
    pairs = _lora(workshop, teaching.base)
    extract(pairs, plain.flux, expert.flux)
    _run(workshop, teaching, lora_parameters(pairs), "subject")


def content(workshop: Workshop) -> ContentEncoder:
    """Train the encoder of content reward."""
    stage, side = workshop.plan.content, workshop.plan.base.large_side
    encoder = train_content_encoder(workshop.sprites, stage, workshop.folder / "content", side=side)
    return encoder.to(workshop.device)


def rewarded(workshop: Workshop) -> None:
    """Style and content reward learning: the LoRA of `subject` learns on."""
    plain, before = workshop.finished().requires_grad_(False), workshop.finished()
    teaching = dataclasses.replace(_teaching(workshop), plain=plain, before=before)
    _load_projector(workshop, teaching.projector)
    subject_recipe = workshop.plan.uso.subject
    pairs = lora_parameters(_lora(workshop, teaching.base))
    for found in (pairs, lora_parameters(_lora(workshop, before))):
        load_average(workshop.folder / "subject", found, subject_recipe)
    before.requires_grad_(False)
    stage, world = workshop.plan.rewarded, workshop.world
    shown = {
        use: Subjects.of_lessons(world, use, LESSON_SEED, len(teaching.lessons.sets[use].prompts))
        for use, _ in stage.mix
    }
    styles, contents = _style_reward(workshop), ContentReward(content(workshop), shown)
    loss_of = teaching.rewarded_loss(stage, styles, contents)
    frozen = [styles.encoder, contents.encoder, plain, before, teaching.projector]
    show = _show(workshop, teaching, teaching.lessons.sets)
    workshop.train(pairs, stage.recipe, loss_of, "rewarded", show, frozen)


def package_all(workshop: Workshop) -> None:
    """Write the checkpoint and, once they are trained, the files of USO."""
    workshop.package()
    if (workshop.folder / "subject" / "state.pt").exists():
        projector, lora = _trained(workshop, workshop.finished())
        package.write_uso(workshop.folder, tower(workshop), projector, lora)


def uso_judge(workshop: Workshop) -> None:
    """Train the judge of `usoflow evaluate` and write it as the package holds it."""
    recipe = workshop.plan.uso_judge
    judge = train_uso_judge(workshop.sprites, recipe, workshop.folder / "uso-judge")
    write_uso_judge(judge, workshop.folder)


def _trained(workshop: Workshop, pocket: Pocket) -> tuple[StyleProjector, dict[str, nn.Parameter]]:
    """The trained projector, and the trained LoRA, attached to `pocket`, by its names in a file."""
    projector = _projector(workshop)
    _load_projector(workshop, projector)
    lora = lora_parameters(_lora(workshop, pocket))
    plan, on = workshop.plan, (workshop.folder / "rewarded" / "state.pt").exists()
    stage, recipe = ("rewarded", plan.rewarded.recipe) if on else ("subject", plan.uso.subject)
    load_average(workshop.folder / stage, lora, recipe)
    return projector, lora


def _load_projector(workshop: Workshop, projector: StyleProjector) -> None:
    parameters = dict(projector.named_parameters())
    load_average(workshop.folder / "style", parameters, workshop.plan.uso.style)


def _teaching(workshop: Workshop) -> Teaching:
    pocket = workshop.finished().requires_grad_(False)
    encoders = _encoders(workshop)
    stage, further = workshop.plan.uso, workshop.plan.rewarded
    mixes = (stage.style_mix, stage.subject_mix, further.mix, further.flow_mix)
    uses = (use for mix in mixes for use, _ in mix)
    sets = lesson_sets(encoders, workshop.folder, uses, count=stage.lessons)
    projector = _projector(workshop).requires_grad_(False)
    return Teaching(pocket, projector, Lessons.of(sets, pocket.stage.tokenizer), stage, workshop.dtype)


def _run(
    workshop: Workshop, teaching: Teaching, parameters: dict[str, nn.Parameter], name: StageName
) -> None:
    rewarding = _style_reward(workshop)
    loss_of: LossFunction = teaching.loss(name, rewarding)
    recipe, mix = teaching.stage.of(name)
    aligned = teaching.projector if name == "subject" else None
    beside = (rewarding.encoder, teaching.plain, teaching.expert, aligned)
    frozen = [network for network in beside if isinstance(network, nn.Module)]
    show = _show(workshop, teaching, [use for use, _ in mix])
    workshop.train(parameters, recipe, loss_of, name, show, frozen)


def _show(workshop: Workshop, teaching: Teaching, uses: Iterable[Use]) -> Callable[[str], None]:
    """What draws a sheet for each use; it is told how their paths begin."""

    def show(stem: str) -> None:
        for use in uses:
            _write_sheet(Path(f"{stem}-{use}.png"), teaching, workshop, use)

    return show


def _write_sheet(path: Path, teaching: Teaching, workshop: Workshop, use: Use) -> None:
    """Four pictures for each of the first lessons of a use: content, style, target, and what is made."""
    made = teaching.sample(teaching.lessons.first(use, SHOWN), seed=0)
    _write_lessons(path, workshop, made, use, np.arange(SHOWN))


def _write_lessons(
    path: Path, workshop: Workshop, made: Tensor, use: Use, indices: npt.NDArray[np.int64]
) -> None:
    drawn = autoencoder.decode(workshop.trained_vae, LatentFormat().from_model(made)).cpu()
    cast = lesson_cast(workshop.world, use)
    lessons = [draw_triplet(cast, LESSON_SEED, int(i), use) for i in indices]
    lesson_sheet(path, workshop.sprites, lessons, drawn, columns=12)


def _encoders(workshop: Workshop) -> Encoders:
    side = workshop.plan.base.large_side
    return Encoders(
        workshop.trained_vae, tower(workshop), workshop.sprites, side, workshop.dtype, workshop.device
    )


def _lora(workshop: Workshop, base: Base) -> list[LoraPair]:
    stage = workshop.plan.uso
    return add_lora(base.flux, stage.rank, stage.wide_rank, stage.subject.seed)


def _projector(workshop: Workshop) -> StyleProjector:
    plan = workshop.plan
    return new_projector(plan.uso, plan.tower.grid**2, plan.tower.dim, plan.base.hidden).to(workshop.device)


def _style_reward(workshop: Workshop) -> StyleReward:
    vae = workshop.trained_vae.requires_grad_(False)
    return StyleReward(reward(workshop), vae, workshop.dtype, workshop.plan.base.large_side)

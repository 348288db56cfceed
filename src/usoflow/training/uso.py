"""Stages `style` and `subject`: from the frozen pocket base to Pocket USO (arXiv 2508.18966, section 3.2).

`style` (style alignment): only the projector learns, so that style tokens before the text tell the base
how to draw. `subject` (content-style disentanglement): the projector is frozen and a LoRA on the transformer
learns to take the subject from reference tokens, whose positions lie beyond the picture's corner ("uxo").
Both then add style reward learning (`reward`). Token order, position ids and modules are the workflow's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from usoflow.models.style_projector import StyleProjector, StyleProjectorConfig
from usoflow.training.base import GUIDANCE, Base, at_rest, noised, random_numbers
from usoflow.training.captions import Ids
from usoflow.training.content import ContentReward
from usoflow.training.initial import initialise
from usoflow.training.lessons import Batch, Lessons, Mix
from usoflow.training.loop import LossFunction, Recipe
from usoflow.training.redraw import redrawn
from usoflow.training.reward import StyleReward, first_pixel
from usoflow.training.text_to_image import STEPS, euler, levels_of
from usoflow.training.triplets import (
    PICTURED,
    STYLED,
    USES,
)

StageName = Literal["style", "subject"]

ROLLOUT_STEPS = 8
TOLD = 0.6  # of the batches with pictures: a base or an expert that is told what they show is the teacher
TOLD_STYLE = 1.0  # how far its answer goes beyond, away from that without the name


@dataclass(frozen=True, slots=True)
class UsoStage:
    """What the `uso` section of a training file says.

    Attributes:
        style, subject: length and speed of the two stages.
        lessons: triplets of each use that are encoded once.
        style_tokens: per level of the projector.
        rank, wide_rank: of the LoRA, see `lora.add_lora`.
        style_mix, subject_mix: how often each use is shown in each stage.
        guidance: with which the LoRA learns to answer, see `Teaching.target`; 1 is none.
        reward_from: part of a stage after which style reward learning begins.
        reward_every: steps from one with a reward to the next.
        reward_weight: of the reward in the loss.
        reward_batch: samples of a step with a reward.
    """

    style: Recipe
    subject: Recipe
    lessons: int = 12_000
    style_tokens: int = 8
    rank: int = 32
    wide_rank: int = 0
    style_mix: Mix = (("style", 1.0),)
    subject_mix: Mix = (
        ("subject", 0.45), ("both", 0.35), ("style", 0.15), ("text", 0.05),
    )  # fmt: skip
    guidance: float = 1.0
    reward_from: float = 0.75
    reward_every: int = 4
    reward_weight: float = 0.1
    reward_batch: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError for sizes of nothing, and for a mix of other uses than there are, or without any
        that can have a reward, or of shares that do not add up.
        """
        counts = (self.lessons, self.style_tokens, self.rank, self.reward_every, self.reward_batch)
        if min(counts) < 1 or min(self.wide_rank, self.reward_weight) < 0 or self.guidance < 1:
            raise ValueError(
                "lessons, style_tokens, rank, reward_every, reward_batch and guidance must be at least 1,"
                " wide_rank and reward_weight not below 0"
            )
        _check_shares(self.style_mix, self.subject_mix)
        for mix, uses in ((self.style_mix, STYLED), (self.subject_mix, USES)):
            unknown = sorted({use for use, _ in mix} - set(uses))
            if unknown:
                raise ValueError(f"a mix has {', '.join(unknown)}, and not only {', '.join(uses)}")
            if self.reward_from < 1 and not any(share > 0 for use, share in mix if use in STYLED):
                raise ValueError(
                    f"a mix has none of {', '.join(STYLED)}: nothing to reward; set reward_from = 1.0"
                )

    def of(self, name: StageName) -> tuple[Recipe, Mix]:
        """Length, speed and lessons of a stage."""
        return (self.style, self.style_mix) if name == "style" else (self.subject, self.subject_mix)


@dataclass(frozen=True, slots=True)
class RewardedStage:
    """What the `rewarded` section of a training file says.

    Attributes:
        recipe: length and speed; its batch is that of the rewarded samples.
        mix: how often each use is rewarded: its style where it is given one, its subject always.
        style_weight, content_weight: of the two rewards in the loss.
        flow_mix, flow_batch, flow_every: flow matching beside them: how often each use, how many samples, and
            how many steps from one to the next.
    """

    recipe: Recipe
    mix: Mix
    flow_mix: Mix
    style_weight: float
    content_weight: float
    flow_batch: int = 32
    flow_every: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError for uses that have no reward, for shares that do not add up, and for weights and
        numbers below nothing.
        """
        _check_shares(self.mix, self.flow_mix)
        unknown = sorted({use for use, _ in self.mix} - {*STYLED, *PICTURED})
        if unknown:
            raise ValueError(f"there is no reward for {', '.join(unknown)}")
        if min(self.style_weight, self.content_weight) < 0 or min(self.flow_batch, self.flow_every) < 1:
            raise ValueError("weights must not be below 0, flow_batch and flow_every at least 1")


def _check_shares(*mixes: Mix) -> None:
    for mix in mixes:
        shares = [share for _, share in mix]
        if not (min(shares, default=0) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-8)):
            raise ValueError(f"the shares of a mix must not be below 0 and add up to 1: {shares}")


def new_projector(stage: UsoStage, patches: int, vision_dim: int, hidden: int) -> StyleProjector:
    """A projector with its first weights."""
    module = StyleProjector(StyleProjectorConfig(patches, stage.style_tokens, vision_dim, hidden))
    initialise(module, torch.Generator().manual_seed(stage.style.seed))
    return module


@dataclass(frozen=True)
class Teaching:
    """The frozen base, the projector, the lessons, and how the model is asked.

    `plain` is the base once more, to which no LoRA is added. Without it nothing is taught of guidance.
    `expert` has learnt to redraw pictures (`redraw`). `before` is the model as it was, whose answers to a
    content picture alone are half of what it is taught further, so that it does not lose what it can.
    """

    base: Base
    projector: StyleProjector
    lessons: Lessons
    stage: UsoStage
    dtype: torch.dtype
    plain: Base | None = None
    expert: Base | None = None
    before: Base | None = None

    def text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The prompts of a batch, encoded."""
        with torch.no_grad():
            return self.base.encode(*batch.ids)

    def velocity(
        self,
        batch: Batch,
        x: Tensor,
        sigma: Tensor,
        *,
        guidance: float = GUIDANCE,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The transformer's answer to a batch, with the content and style that its use has; float32.

        `text` are its prompts, where they are encoded already.
        """
        lessons = self.lessons.sets[batch.use]
        text = self.text(batch) if text is None else text
        style = self.projector(lessons.states(batch.indices)) if batch.use in STYLED else None
        content = [lessons.rows("content", batch.indices)] if batch.use in PICTURED else []
        answer = self.base.velocity(
            x, sigma, text, guidance=guidance, dtype=self.dtype, references=content, style=style
        )
        return answer.float()

    def flow_loss(self, mix: Mix, recipe: Recipe, *, guidance: float = GUIDANCE) -> LossFunction:
        """Flow matching on a mix of uses, one use per batch."""

        def loss_of(done: int) -> Tensor:
            rng = np.random.default_rng((recipe.seed, done))
            batch = self.lessons.choose(mix, rng, recipe.batch, told=0.0 if self.plain is None else TOLD)
            x = self.lessons.sets[batch.use].rows("target", batch.indices)
            numbers = random_numbers(x.device, recipe.seed, done)
            sigma, x_s, noise = noised(x, self.base.stage, numbers)
            got = self.velocity(batch, x_s, sigma, guidance=guidance)
            wanted = self.target(batch, x_s, sigma, noise - x, got.detach())
            return (got - wanted).pow(2).mean()

        return loss_of

    @torch.no_grad()
    def target(self, batch: Batch, x_s: Tensor, sigma: Tensor, straight: Tensor, got: Tensor) -> Tensor:
        """What should have been answered where `got` was: the straight velocity, or one with guidance.

        A base whose guidance is distilled must not unlearn it. So words alone are answered as the plain base
        does, and a style that has a name as the plain base does when it is told the name: c + w (c - p),
        with p its answer to the prompt without (classifier-free guidance, arXiv 2207.12598, of the style).
        A content picture is answered as the expert does, without such a push, which would cost the subject.
        Elsewhere there is no teacher, and guidance is learnt from the answer itself (`at_rest`).
        """
        if self.plain is None:
            return straight
        words = functools.partial(_words_alone, self.plain, x_s, sigma, self.dtype)
        if batch.use == "text":
            return words(batch.ids)
        if batch.told is not None and batch.use == "style":
            named, unnamed = words(batch.told), words(batch.ids)
            return named + TOLD_STYLE * (named - unnamed)
        if batch.told is not None and self.expert is not None:
            content = self.lessons.sets[batch.use].rows("content", batch.indices)
            text = self.expert.encode(*batch.told)
            return redrawn(self.expert, x_s, sigma, text, content, dtype=self.dtype)
        away = words(self.lessons.silence(len(x_s)), guidance=1.0)
        own = at_rest(straight, got, away, self.stage.guidance)
        if self.before is None or batch.use != "subject":
            return own
        known = dataclasses.replace(self, base=self.before).velocity(batch, x_s, sigma)
        return (own + known) / 2

    def reward_loss(self, mix: Mix, recipe: Recipe, reward: StyleReward) -> LossFunction:
        """Style reward of pictures begun without and finished with gradients, as a loss.

        Of lessons whose style has a name: others the style encoder has not learnt.
        """

        styled = tuple((use, share) for use, share in mix if use in STYLED)
        total = sum(share for _, share in styled)
        shares = tuple((use, share / total) for use, share in styled)

        def loss_of(done: int) -> Tensor:
            rng = np.random.default_rng((recipe.seed, done, 1))
            batch = self.lessons.choose(shares, rng, self.stage.reward_batch, told=1.0)
            first = first_pixel(rng)
            clean = self._finished(batch, rng)
            return reward.loss(clean, self.lessons.sets[batch.use].pictures(batch.indices), first=first)

        return loss_of

    def rewarded_loss(self, stage: RewardedStage, style: StyleReward, content: ContentReward) -> LossFunction:
        """Both rewards at every step, and flow matching now and then, so that nothing else is unlearnt."""
        recipe = stage.recipe
        flow = self.flow_loss(stage.flow_mix, dataclasses.replace(recipe, batch=stage.flow_batch))

        def loss_of(done: int) -> Tensor:
            rng = np.random.default_rng((recipe.seed, done, 2))
            batch = self.lessons.choose(stage.mix, rng, recipe.batch, told=1.0)
            made = style.decoded(self._finished(batch, rng))
            loss = stage.content_weight * content.loss(made, batch.use, batch.indices, rng)
            if batch.use in STYLED:
                wanted = self.lessons.sets[batch.use].pictures(batch.indices)
                loss = loss + stage.style_weight * style.distance(made, wanted, first=first_pixel(rng))
            if done // recipe.batch % stage.flow_every == 0:
                loss = loss + flow(done)
            return loss

        return loss_of

    def _finished(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        """From noise to a random level of a short schedule; then, with gradients, to 0 in one step."""
        stop = int(rng.integers(1, ROLLOUT_STEPS))
        levels = levels_of(ROLLOUT_STEPS)[: stop + 1]
        text = self.text(batch)
        x, sigma = self._denoise(batch, text, levels, int(rng.integers(2**62))), levels[-1]
        return x - sigma * self.velocity(batch, x, sigma.expand(len(x)), text=text)

    def sample(self, batch: Batch, *, seed: int) -> Tensor:
        """What a workflow makes of the lessons' conditions, in 20 steps: latents in the model's scale."""
        return self._denoise(batch, self.text(batch), levels_of(STEPS), seed)

    @torch.no_grad()
    def _denoise(self, batch: Batch, text: tuple[Tensor, Tensor], levels: Tensor, seed: int) -> Tensor:
        like = self.lessons.sets[batch.use].rows("target", batch.indices)
        x = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
        return euler(x, levels, lambda x, sigma: self.velocity(batch, x, sigma, text=text))

    def loss(self, name: StageName, reward: StyleReward, *, processes: int = 1) -> LossFunction:
        """Flow matching and, from the stage's part on and now and then, the reward beside it.

        Of several processes all have it in the same steps, for it takes the longest.
        """
        recipe, mix = self.stage.of(name)
        # Without a teacher of guidance the straight velocity is what is answered at a guidance of 1: to ask
        # for it at the one of workflows would unlearn what is distilled
        # (https://github.com/black-forest-labs/flux/issues/79).
        flow = self.flow_loss(mix, recipe, guidance=1.0 if self.plain is None else GUIDANCE)
        rewarded = self.reward_loss(mix, recipe, reward)

        def loss_of(done: int) -> Tensor:
            turn = done // (recipe.batch * processes) % self.stage.reward_every == 0
            if not turn or done < self.stage.reward_from * recipe.samples:
                return flow(done)
            return flow(done) + self.stage.reward_weight * rewarded(done)

        return loss_of


def _words_alone(
    base: Base,
    x: Tensor,
    sigma: Tensor,
    dtype: torch.dtype,
    ids: tuple[Ids, Ids],
    guidance: float = GUIDANCE,
) -> Tensor:
    """A base's answer to prompts without pictures."""
    return base.velocity(x, sigma, base.encode(*ids), guidance=guidance, dtype=dtype).float()

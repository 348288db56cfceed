"""The stages that make the pocket base, on one work folder; `run` lists them, `uso_stages` has the others.

Each stage reads what the ones before left in the folder and continues where it was interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from usoflow.models.vae import AutoEncoder
from usoflow.training import autoencoder, drawings, evaluate, package, text_to_image
from usoflow.training.base import GUIDANCE, Batches, Pocket, flow_loss, guided_loss
from usoflow.training.drawings import Sprites
from usoflow.training.evaluate import Question
from usoflow.training.kept import fingerprint, whole
from usoflow.training.latents import LatentSet, cache
from usoflow.training.loop import CPU, LossFunction, Recipe, Training, load_average, stage_missing
from usoflow.training.plan import Plan
from usoflow.training.scenes import caption, compose, draw_scene, pictures_of
from usoflow.training.sheets import contact_sheet, loss_curve
from usoflow.training.states import read_state
from usoflow.training.world import World

LATENT_SEED = 11  # of the scenes whose latents are cached
STATISTICS = 1024  # scenes whose latents are measured for folding
SHEET_SIDE = 128  # pixels of a picture on a sheet
QUESTIONS = 300  # of the evaluation
DISTILLED_CFG = 1.7  # what distillation left to do; at 1, one evaluation per step, pictures are fair
CHECKPOINT = "usoflow-pocket.safetensors"


@dataclass(frozen=True)
class Workshop:
    """A work folder and the plan; every artefact of every stage is found through it."""

    folder: Path
    plan: Plan
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = False
    device: torch.device = CPU
    world: World = field(default_factory=World.load)

    @functools.cached_property
    def sprites(self) -> Sprites:
        if not drawings.rendered(self.folder / "sprites"):
            raise stage_missing("render", self.folder)
        return Sprites(self.world, self.folder / "sprites")

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def render(self) -> None:
        """Fetch and render the drawings, unless they are there, and show what training will see."""
        world = self.world
        if drawings.rendered(self.folder / "sprites"):
            return
        drawings.fetch(world, self.folder / "npm")
        drawings.render_sprites(world, self.folder / "npm", self.folder / "sprites")
        scenes = [draw_scene(world, LATENT_SEED, i) for i in range(80)]
        pictures = [compose(scene, self.sprites, side=128) for scene in scenes]
        labels = [caption(world, scene) for scene in scenes]
        contact_sheet(self.folder / "scenes.png", pictures, labels, columns=10, zoom=1)

    def vae(self) -> None:
        """Train the autoencoder and write the folded one."""
        module = autoencoder.train(self.sprites, self.plan.vae, self.folder / "vae", dtype=self.dtype)
        world, side = self.sprites.world, self.plan.vae.side
        scenes = [draw_scene(world, LATENT_SEED, i) for i in range(STATISTICS)]
        pictures = pictures_of(self.sprites, scenes, side)
        result = autoencoder.folded(module, autoencoder.encode(module, pictures))
        with whole(self.folder / "vae" / "folded.pt") as partial:
            torch.save(result.state_dict(), partial)

    def base(self) -> None:
        """Train text encoders and transformer by flow matching."""
        self._flow(self.pocket(), self.plan.base.recipe, "base", self._batches)

    def large(self) -> None:
        """Train on, with larger pictures."""
        pocket = self.pocket()
        self.load(pocket, "base")
        self._flow(pocket, self.plan.base.large, "large", self.large_batches, pocket)

    def guided(self) -> None:
        """Distil guidance into a copy of the trained base."""
        teacher, pocket = self.pocket(), self.pocket()
        for module in (teacher, pocket):
            self.load(module, "large")
        loss_of = guided_loss(pocket, teacher, self.large_batches, dtype=self.dtype)
        self._run(pocket, self.plan.base.guided, loss_of, "guided", self.large_batches.latents.side, teacher)

    @property
    def cfg(self) -> float:
        """At which pictures of a caption alone are made, with the empty caption against."""
        return DISTILLED_CFG if (self.folder / "guided" / "state.pt").exists() else GUIDANCE

    def package(self) -> None:
        """Write the checkpoint from the weights of the last stage that has been run."""
        package.write(self.checkpoint, self.finished(), self.trained_vae)

    def judge(self) -> None:
        """Train the encoder that `evaluate` measures with."""
        evaluate.train_judge(self.sprites, self.plan.judge, self.folder / "judge")

    def evaluate(self) -> None:
        """Measure the last stage's pictures beside real ones; write `evaluation.json` and a sheet."""
        judge = evaluate.train_judge(self.sprites, self.plan.judge, self.folder / "judge")
        asked = evaluate.questions(self.sprites, QUESTIONS)
        answers = self._answers(self.finished(), asked)
        scores = {name: evaluate.measure(judge, asked, images) for name, images in answers.items()}
        evaluate.report(self.folder / "evaluation.json", scores)

    def _answers(self, pocket: Pocket, asked: list[Question]) -> dict[str, torch.Tensor]:
        """Real pictures, the same through the VAE, and made ones, of a prompt list."""
        vae, side, prompts = self.trained_vae, self.plan.base.large_side, [q.prompt for q in asked]
        real = pictures_of(self.sprites, [q.scene for q in asked], side)
        through = [autoencoder.decode(vae, autoencoder.encode(vae, part)) for part in real.split(50)]
        made = [
            text_to_image.sample(
                pocket, vae, prompts[i : i + 50], side=side, dtype=self.dtype, seed=i, cfg=self.cfg
            )
            for i in range(0, len(prompts), 50)
        ]
        contact_sheet(self.folder / "evaluation.png", list(made[0].numpy()), prompts[:50], columns=10)
        return {"real": real, "real through the VAE": torch.cat(through), "made": torch.cat(made)}

    @functools.cached_property
    def trained_vae(self) -> AutoEncoder:
        """The trained autoencoder, folded."""
        module, path = autoencoder.new_autoencoder(self.plan.vae), self.folder / "vae" / "folded.pt"
        if not path.exists():
            raise stage_missing("vae", self.folder)
        with read_state(path) as weights:
            module.load_state_dict(weights)
        return module.to(self.device)

    def latents(self, side: int, count: int) -> LatentSet:
        """The latents of the first scenes, cached."""
        folder, vae = self.folder / f"latents-{side}", self.trained_vae
        return cache(
            vae, self.sprites, folder, seed=LATENT_SEED, side=side, count=count, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip

    @functools.cached_property
    def _batches(self) -> Batches:
        return Batches.of(self.latents(self.plan.base.side, self.plan.base.cached), self.plan.base)

    @functools.cached_property
    def large_batches(self) -> Batches:
        return Batches.of(
            self.latents(self.plan.base.large_side, self.plan.base.large_cached), self.plan.base
        )

    def pocket(self) -> Pocket:
        pocket = Pocket(self.plan.base, *self._batches.vocabularies()).to(self.device)
        return pocket.compiled() if self.compiled else pocket

    def finished(self) -> Pocket:
        """The modules of the last stage that has been run."""
        pocket = self.pocket()
        stages = ("guided", "large", "base")
        done = [stage for stage in stages if (self.folder / stage / "state.pt").exists()]
        self.load(pocket, done[0] if done else stages[-1])
        return pocket

    def load(self, pocket: Pocket, stage: str) -> None:
        """Put the averaged weights of a stage into the modules."""
        base = self.plan.base
        recipes = {
            "base": base.recipe, "large": base.large, "guided": base.guided,
            "redraw": self.plan.redraw.recipe,
        }  # fmt: skip
        load_average(self.folder / stage, dict(pocket.named_parameters()), recipes[stage])

    def _flow(self, pocket: Pocket, recipe: Recipe, name: str, batches: Batches, *begun: nn.Module) -> None:
        loss_of = flow_loss(pocket, recipe, batches, dtype=self.dtype)
        self._run(pocket, recipe, loss_of, name, batches.latents.side, *begun)

    def _run(
        self,
        pocket: Pocket,
        recipe: Recipe,
        loss_of: LossFunction,
        name: str,
        side: int,
        *frozen: nn.Module,
    ) -> None:
        def show(stem: str) -> None:
            prompts, vae = text_to_image.PROMPTS, self.trained_vae
            pictures = text_to_image.sample(pocket, vae, prompts, side=side, dtype=self.dtype, cfg=self.cfg)
            sheet = Path(f"{stem}.png")
            contact_sheet(sheet, list(pictures.numpy()), prompts, columns=8, zoom=max(SHEET_SIDE // side, 1))

        self.train(dict(pocket.named_parameters()), recipe, loss_of, name, show, frozen)

    def train(
        self,
        parameters: Mapping[str, nn.Parameter],
        recipe: Recipe,
        loss_of: LossFunction,
        name: str,
        show: Callable[[str], None],
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        """Run a stage to its end from wherever its folder is, with a loss curve at every saved state.

        `show` draws its sheets, then and with the averaged weights; it is told how their paths begin.
        `frozen` is what takes part and does not learn, or is begun from: what was begun with others does not
        go on.
        """
        training = Training(parameters, recipe, self.folder / name, made_with=fingerprint(*frozen))
        training.resume()

        def report() -> None:
            loss_curve(training.folder / "loss.png", *zip(*training.log, strict=True), title=name)
            with training.averaged():
                show(str(training.folder / f"sheet-{training.done:07d}"))

        training.run(loss_of, after_save=report)

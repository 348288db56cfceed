"""The stages of training, in order, on one work folder: what `usoflow train STAGE` runs.

    render   fetch the drawings, render the sprites, write a contact sheet
    vae      train the autoencoder, fold its latent statistics
    decoder  train the decoder further on the encoder as it is
    base     cache latents, train text encoders and transformer
    large    train them further on larger pictures
    guided   distil guidance into the transformer
    package  write the checkpoint
    judge    train the encoder that measures, used for nothing else
    evaluate measure the checkpoint's modules on the fixed prompt list

Each stage reads what the ones before left in the folder and continues where it was interrupted.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from usoflow.errors import UsoflowError
from usoflow.models.vae import AutoEncoder
from usoflow.training import autoencoder, drawings, evaluate, package, text_to_image
from usoflow.training.autoencoder import VaeStage
from usoflow.training.base import BaseStage, Batches, Pocket, flow_loss, guided_loss
from usoflow.training.drawings import Sprites
from usoflow.training.evaluate import Question
from usoflow.training.latents import LatentSet, cache
from usoflow.training.loop import LossFunction, Recipe, Training, swap
from usoflow.training.scenes import caption, compose, draw_scene
from usoflow.training.sheets import contact_sheet, loss_curve
from usoflow.training.world import World

LATENT_SEED = 11  # of the scenes whose latents are cached
STATISTICS = 1024  # scenes whose latents are measured for folding
QUESTIONS = 300  # of the evaluation
CHECKPOINT = "usoflow-pocket.safetensors"


@dataclass(frozen=True, slots=True)
class Plan:
    """A training file: one section per stage that has settings."""

    vae: VaeStage
    base: BaseStage
    judge: Recipe

    @classmethod
    def read(cls, path: Path | None) -> Plan:
        """Read a TOML file; without one, the plan that made the shipped weights.

        Raises:
            UsoflowError: "training_config" naming what is wrong.
        """
        shipped = resources.files("usoflow.training").joinpath("configs", "pocket.toml")
        try:
            data = tomllib.loads((path or shipped).read_text("utf-8"))
            vae, base = data["vae"], data["base"]
            vae |= {"recipe": Recipe(**vae["recipe"]), "decoder": Recipe(**vae["decoder"])}
            vae |= {"widths": tuple(vae["widths"])}
            base |= {name: Recipe(**base[name]) for name in ("recipe", "large", "guided")}
            return cls(VaeStage(**vae), BaseStage(**base), Recipe(**data["judge"]["recipe"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsoflowError("training_config", f"{path}: {error}.") from None


@dataclass(frozen=True)
class Workshop:
    """A work folder and the plan; every artefact of every stage is found through it."""

    folder: Path
    plan: Plan
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = False

    @functools.cached_property
    def sprites(self) -> Sprites:
        return Sprites(World.load(), self.folder / "sprites")

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def render(self) -> None:
        """Fetch and render the drawings, and show what training will see."""
        world = self.sprites.world
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
        pictures = np.stack([compose(scene, self.sprites, side=side) for scene in scenes])
        result = autoencoder.folded(module, autoencoder.encode(module, torch.from_numpy(pictures)))
        torch.save(result.state_dict(), self.folder / "vae" / "folded.pt")

    def decoder(self) -> None:
        """Train the decoder of the folded autoencoder further; latents stay what they are."""
        module = self.folded_vae
        autoencoder.train_decoder(
            module, self.sprites, self.plan.vae, self.folder / "decoder", dtype=self.dtype
        )
        torch.save(module.state_dict(), self.folder / "decoder" / "vae.pt")

    def base(self) -> None:
        """Train text encoders and transformer by flow matching."""
        pocket = self._pocket()
        recipe = self.plan.base.recipe
        self._run(pocket, recipe, flow_loss(pocket, recipe, self._batches, dtype=self.dtype), "base")

    def large(self) -> None:
        """Train on, with larger pictures."""
        pocket = self._pocket()
        self._load(pocket, "base")
        recipe = self.plan.base.large
        self._run(pocket, recipe, flow_loss(pocket, recipe, self._large, dtype=self.dtype), "large")

    def guided(self) -> None:
        """Distil guidance into a copy of the trained base."""
        teacher, pocket = self._pocket(), self._pocket()
        for module in (teacher, pocket):
            self._load(module, "large")
        loss_of = guided_loss(pocket, teacher, self._large, dtype=self.dtype)
        self._run(pocket, self.plan.base.guided, loss_of, "guided")

    def package(self) -> None:
        """Write the checkpoint from the guided weights, or, before there are any, from the base's."""
        package.write(self.checkpoint, self._finished(), self.vae_in_use)

    def judge(self) -> None:
        """Train the encoder that `evaluate` measures with."""
        evaluate.train_judge(self.sprites, self.plan.judge, self.folder / "judge", side=self.plan.base.side)

    def evaluate(self) -> None:
        """Measure the last stage's pictures beside real ones; write `evaluation.json` and a sheet."""
        side = self.plan.base.side
        judge = evaluate.train_judge(self.sprites, self.plan.judge, self.folder / "judge", side=side)
        asked = evaluate.questions(self.sprites, QUESTIONS)
        answers = self._answers(self._finished(), asked)
        scores = {name: evaluate.measure(judge, asked, images) for name, images in answers.items()}
        evaluate.report(self.folder / "evaluation.json", scores)

    def _answers(self, pocket: Pocket, asked: list[Question]) -> dict[str, torch.Tensor]:
        """Real pictures, the same through the VAE, and made ones, of a prompt list."""
        vae, prompts = self.vae_in_use, [q.prompt for q in asked]
        real = evaluate.pictures(self.sprites, [q.scene for q in asked], self.plan.base.side)
        through = [autoencoder.decode(vae, autoencoder.encode(vae, part)) for part in real.split(50)]
        made = [
            text_to_image.sample(pocket, vae, prompts[i : i + 50], dtype=self.dtype, seed=i)
            for i in range(0, len(prompts), 50)
        ]
        contact_sheet(self.folder / "evaluation.png", list(made[0].numpy()), prompts[:50], columns=10)
        return {"real": real, "real through the VAE": torch.cat(through), "made": torch.cat(made)}

    @functools.cached_property
    def folded_vae(self) -> AutoEncoder:
        """The trained autoencoder, folded."""
        module = autoencoder.new_autoencoder(self.plan.vae)
        module.load_state_dict(torch.load(self.folder / "vae" / "folded.pt", weights_only=True))
        return module

    @functools.cached_property
    def vae_in_use(self) -> AutoEncoder:
        """The folded autoencoder, with the further trained decoder if there is one."""
        module, further = self.folded_vae, self.folder / "decoder" / "vae.pt"
        if further.exists():
            module.load_state_dict(torch.load(further, weights_only=True))
        return module

    def latents(self, side: int) -> LatentSet:
        """The cached latents of the plan's scenes."""
        folder, count = self.folder / f"latents-{side}", self.plan.base.cached
        vae = self.folded_vae
        return cache(vae, self.sprites, folder, seed=LATENT_SEED, side=side, count=count, dtype=self.dtype)

    @functools.cached_property
    def _batches(self) -> Batches:
        return Batches.of(self.latents(self.plan.base.side), self.plan.base)

    @functools.cached_property
    def _large(self) -> Batches:
        return Batches.of(self.latents(self.plan.base.large_side), self.plan.base)

    def _pocket(self) -> Pocket:
        pocket = Pocket(self.plan.base, *self._batches.vocabularies())
        return pocket.compiled() if self.compiled else pocket

    def _finished(self) -> Pocket:
        """The modules of the last stage that has been run."""
        pocket = self._pocket()
        stages = ("guided", "large", "base")
        self._load(pocket, next(s for s in stages if (self.folder / s / "state.pt").exists()))
        return pocket

    def _load(self, pocket: Pocket, stage: str) -> None:
        """Put the averaged weights of a stage into the modules."""
        state = torch.load(self.folder / stage / "state.pt", weights_only=True)
        swap(dict(pocket.named_parameters()), state["average"])

    def _run(self, pocket: Pocket, recipe: Recipe, loss_of: LossFunction, name: str) -> None:
        folder = self.folder / name
        training = Training(dict(pocket.named_parameters()), recipe, folder)
        training.resume()

        def report() -> None:
            loss_curve(folder / "loss.png", *zip(*training.log, strict=True), title=name)
            trained = swap(training.parameters, training.average)
            pictures = text_to_image.sample(pocket, self.vae_in_use, text_to_image.PROMPTS, dtype=self.dtype)
            swap(training.parameters, trained)
            sheet = folder / f"sheet-{training.done:07d}.png"
            contact_sheet(sheet, list(pictures.numpy()), text_to_image.PROMPTS, columns=8)

        training.run(loss_of, after_save=report)


STAGES: Mapping[str, Callable[[Workshop], None]] = MappingProxyType(
    {
        "render": Workshop.render,
        "vae": Workshop.vae,
        "decoder": Workshop.decoder,
        "base": Workshop.base,
        "large": Workshop.large,
        "guided": Workshop.guided,
        "package": Workshop.package,
        "judge": Workshop.judge,
        "evaluate": Workshop.evaluate,
    }
)

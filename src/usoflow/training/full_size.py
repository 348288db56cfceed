"""The stages `style` and `subject` on FLUX.1 itself: files of the official width, a frozen base.

    accelerate launch -m usoflow.training.full_size style --models MODELS --work DIR
    accelerate launch -m usoflow.training.full_size subject --models MODELS --work DIR --fp8

Lessons, flow matching, style reward, token order and position ids are those of the pocket (`uso`); guidance
and an expert's answers are not taught. The base is another (`FullBase`): read from a model folder, never
changed, in bf16 or held in fp8, its blocks recomputed in the backward pass (gradient checkpointing, arXiv
1604.06174), so that only one block's activations are kept. All processes are on one machine: they share the
work folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from usoflow.training import LIBRARIES

if __name__ == "__main__" and not all(map(importlib.util.find_spec, LIBRARIES)):  # before they are imported
    sys.stderr.write('error: Not all libraries of the extra are installed.\npip install "usoflow[train]"\n')
    sys.exit(2)

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component
from usoflow.models.clip import ClipText
from usoflow.models.flux import Flux, FluxInputs
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_clip, load_siglip, load_t5, load_vae
from usoflow.models.placement import Placement
from usoflow.models.style_projector import StyleProjector
from usoflow.models.t5 import T5Encoder
from usoflow.models.vae import AutoEncoder
from usoflow.models.weights import read_tensors
from usoflow.settings import Folders, check_writable, find_folders
from usoflow.training.base import Base, BaseStage
from usoflow.training.captions import Ids, end_positions
from usoflow.training.kept import write_tensors
from usoflow.training.lessons import Lessons, lesson_sets
from usoflow.training.loop import AGAIN, LossFunction, Recipe, adam_groups, want_of_memory_told
from usoflow.training.lora import add_lora, lora_parameters
from usoflow.training.plan import Plan
from usoflow.training.reward import StyleReward, train_style_encoder
from usoflow.training.stages import Workshop
from usoflow.training.states import read_state, require_finite_weights, require_settings, write_state
from usoflow.training.triplets import Encoders
from usoflow.training.uso import StageName, Teaching, UsoStage, new_projector
from usoflow.training.uso_evaluate import components_of

NEEDED = ("flux", "clip_l", "t5", "vae", "siglip")
OUTPUT = {"style": "projector.safetensors", "subject": "uso-lora.safetensors"}
SAVED_EVERY = 500  # steps


@dataclass(frozen=True)
class FullBase(Base):
    """FLUX.1 and its text encoders, frozen, as `uso.Teaching` asks them; computes on one device."""

    flux: Flux
    clip: ClipText
    t5: T5Encoder
    stage: BaseStage

    @classmethod
    def read(
        cls, parts: Mapping[str, Component], placement: Placement, stage: BaseStage, *, fp8: bool
    ) -> FullBase:
        """From the components of files.

        Args:
            parts: by kind.
            placement: where and in which dtype the transformer computes.
            stage: whose noise levels are used.
            fp8: hold the blocks' weights in fp8 (e4m3fn), half the memory of bf16.
        """
        held = "fp8_e4m3fn" if fp8 else "default"
        flux = ModelLibrary(placement).flux(parts["flux"], (), held)
        recomputed(flux)
        clip, t5 = placement.settle(load_clip(parts["clip_l"])), placement.settle(load_t5(parts["t5"]))
        stage = dataclasses.replace(stage, t5_length=t5.config.min_length, clip_length=clip.config.positions)
        return cls(flux, clip, t5, stage)

    def encode(self, t5_ids: Ids, clip_ids: Ids) -> tuple[Tensor, Tensor]:
        device = self.t5.shared.weight.device
        ends = end_positions(clip_ids).to(device)
        pooled = self.clip(torch.from_numpy(clip_ids).to(device), ends)
        return self.t5(torch.from_numpy(t5_ids).to(device)), pooled

    def step(self, x: Tensor, sigma: Tensor, inputs: FluxInputs) -> Tensor:
        """The transformer's answer to prepared inputs."""
        answer: Tensor = self.flux(x, sigma, inputs)
        return answer


def recomputed(flux: Flux) -> None:
    """Let every block compute its activations again in the backward pass instead of keeping them."""
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Step(nn.Module):
    """A loss as a module: what `accelerate` distributes. Holds what is learned, and nothing of the base."""

    def __init__(self, learned: Mapping[str, nn.Parameter], loss_of: LossFunction) -> None:
        super().__init__()
        self.learned = nn.ParameterList(learned.values())
        self.loss_of = loss_of

    def forward(self, done: int) -> Tensor:
        """The loss of the batch that begins at sample `done`."""
        return self.loss_of(done)


def learn(
    step: Step, recipe: Recipe, accelerator: Accelerator, state: Path, settings: Mapping[str, Any]
) -> list[float]:
    """Run the recipe with AdamW, on as many processes as `accelerate` was launched with.

    Args:
        step: what is learned, and its loss.
        recipe: length and speed.
        accelerator: the processes.
        state: the file from which an interrupted run continues; written every `SAVED_EVERY` steps and at the
            end.
        settings: what must not have changed since then.

    Returns:
        The losses of the steps done now.

    Raises:
        UsoflowError: "non_finite" if a loss or a weight is no number, "training_config" if the file is not of
            this run.
    """
    parameters = list(step.parameters())
    optimiser = torch.optim.AdamW(adam_groups(parameters, recipe), lr=recipe.rate)
    begun = _continue(state, step, optimiser, settings) if state.exists() else 0
    save = functools.partial(_save, state, step, optimiser, settings)
    step, optimiser = accelerator.prepare(step, optimiser)
    losses: list[float] = []
    at_once = recipe.batch * accelerator.num_processes
    for first in range(begun, recipe.samples, at_once):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(first)
        loss = step(first + recipe.batch * accelerator.process_index)
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss.detach()):
            raise UsoflowError(
                "non_finite", f"The loss is {losses[-1]} after {first} samples.", remedy=_again(state)
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        done = first + at_once
        accelerator.print(f"{done} samples, loss {losses[-1]:.4f}")
        if accelerator.is_main_process and (len(losses) % SAVED_EVERY == 0 or done >= recipe.samples):
            save(done)
    return losses


def _save(
    state: Path, step: Step, optimiser: torch.optim.Optimizer, settings: Mapping[str, Any], done: int
) -> None:
    require_finite_weights(step.parameters(), done, _again(state))
    states = {"step": step.state_dict(), "optimiser": optimiser.state_dict()}
    write_state(state, {"done": done, "settings": dict(settings), **states})


def _again(state: Path) -> str:
    return AGAIN.format(state, "--rate")


def _continue(state: Path, step: Step, optimiser: torch.optim.Optimizer, settings: Mapping[str, Any]) -> int:
    """After how many samples it was saved."""
    with read_state(state) as saved:
        require_settings(saved, settings)
        step.load_state_dict(saved["step"])
        optimiser.load_state_dict(saved["optimiser"])
        done: int = saved["done"]
    return done


@dataclass(frozen=True)
class Task:
    """What the command line says.

    Attributes:
        name: "style" or "subject".
        models: the folder of FLUX.1 and SigLIP; None for the usual places.
        workshop: the folder of drawings, lessons and results, and the settings that are not here.
        side: of the pictures, in pixels.
        fp8: hold the base's blocks in fp8.
        lessons, style_tokens, rank: as in `UsoStage`.
        recipe: length and speed.
    """

    name: StageName
    models: Path | None
    workshop: Workshop
    side: int
    fp8: bool
    lessons: int
    style_tokens: int
    rank: int
    recipe: Recipe

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that there cannot be."""
        if self.side < 16 or self.side % 16:
            raise ValueError(f"the side of pictures must be a multiple of 16, not {self.side}")
        _ = self.stage  # which checks the others

    @property
    def stage(self) -> UsoStage:
        """What the lessons are taught by."""
        return dataclasses.replace(
            self.workshop.plan.uso, style=self.recipe, subject=self.recipe, lessons=self.lessons,
            style_tokens=self.style_tokens, rank=self.rank, reward_batch=self.recipe.batch,
        )  # fmt: skip


def run(task: Task, accelerator: Accelerator) -> list[float]:
    """One stage: encode its lessons, learn, write the projector or the LoRA in the official layout.

    An interrupted one continues.
    """
    placement = Placement(accelerator.device, torch.bfloat16)
    parts = components_of(_folders(task), NEEDED)
    accelerator.print("Read: " + ", ".join(dict.fromkeys(str(part.file.path) for part in parts.values())))
    workshop, plan = task.workshop, task.workshop.plan
    accelerator.print("Drawings, lessons and the style encoder are made where they are not there yet.")
    with accelerator.main_process_first():
        workshop.render()
    with accelerator.main_process_first():  # the others find what it has written
        teaching, vae = _teaching(task, parts, placement)
        # As the pocket's: at 512 pixels its pictures would take 47 GB. Style encoders look at small ones.
        small = plan.base.large_side
        encoder = train_style_encoder(workshop.sprites, plan.reward, workshop.folder / "reward", side=small)
    learned = _learned(task, teaching)
    reward = StyleReward(encoder.to(accelerator.device), vae, torch.float32, small)
    step = Step(learned, teaching.loss(task.name, reward, processes=accelerator.num_processes))
    state = workshop.folder / f"{task.name}.pt"
    losses = learn(step, task.recipe, accelerator, state, _settings(task, parts["flux"]))
    if accelerator.is_main_process:
        written = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in learned.items()}
        write_tensors(workshop.folder / OUTPUT[task.name], written)
    return losses


def _settings(task: Task, flux: Component) -> dict[str, Any]:
    """What a run that continues must have as before; length and rate may be others."""
    aligned = task.workshop.folder / OUTPUT["style"]
    projector = aligned.read_bytes() if task.name == "subject" and aligned.exists() else b""
    return {
        "side": task.side, "fp8": task.fp8, "lessons": task.lessons, "rank": task.rank,
        "style_tokens": task.style_tokens, "batch": task.recipe.batch,
        "projector": hashlib.sha256(projector).hexdigest(), "flux": _identity(flux),
    }  # fmt: skip


def _identity(model: Component) -> str:
    """What tells one transformer from another, wherever its file lies: header, size and the small tensors."""
    tensors = sorted((name, info.shape, info.dtype, info.start) for name, info in model.tensors.items())
    digest = hashlib.sha256(repr((model.file.bytes, tensors)).encode())
    small = [name for name in model.tensors if name.endswith("norm.key_norm.scale")]
    for name, tensor in sorted(read_tensors(model, small).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _folders(task: Task) -> Folders:
    """Those that are named; by themselves never the package's small models."""
    folders = find_folders(models=task.models)
    if task.models is None and folders.are_pocket("checkpoints"):
        raise UsoflowError(
            "model_missing", "There are only the package's own small models.",
            remedy="Name the folder of FLUX.1 with --models or USOFLOW_MODELS.",
        )  # fmt: skip
    return folders


def _teaching(
    task: Task, parts: Mapping[str, Component], placement: Placement
) -> tuple[Teaching, AutoEncoder]:
    """What teaches, and the VAE that shows what is made; the vision tower is needed for lessons alone."""
    workshop, stage = task.workshop, task.stage
    vae, tower = placement.settle(load_vae(parts["vae"])), placement.settle(load_siglip(parts["siglip"]))
    encoders = Encoders(vae, tower, workshop.sprites, task.side, device=placement.device)
    sets = lesson_sets(
        encoders, workshop.folder, (use for use, _ in stage.of(task.name)[1]),
        count=stage.lessons, name=f"lessons-{task.side}",
    )  # fmt: skip
    base = FullBase.read(parts, placement, workshop.plan.base, fp8=task.fp8)
    patches = (tower.config.image_size // tower.config.patch) ** 2
    projector = new_projector(stage, patches, tower.config.dim, base.flux.config.hidden)
    projector.to(placement.device).requires_grad_(False)
    # The states of one picture are 5 MB: they stay in the file.
    kept = {use: dataclasses.replace(found, resident=False) for use, found in sets.items()}
    lessons = Lessons.of(kept, base.stage.tokenizer)
    return Teaching(base, projector, lessons, stage, placement.dtype), vae


def _learned(task: Task, teaching: Teaching) -> dict[str, nn.Parameter]:
    """What a stage learns: the projector, or the LoRA beside the projector that `style` wrote."""
    projector: StyleProjector = teaching.projector
    if task.name == "style":
        return dict(projector.requires_grad_(True).named_parameters())
    aligned = task.workshop.folder / OUTPUT["style"]
    if not aligned.exists():
        raise UsoflowError(
            "training_config", f"The stage style was not run in {aligned.parent}.",
            remedy="Run it first: `python -m usoflow.training.full_size style` with the same --work.",
        )  # fmt: skip
    projector.load_state_dict({name: value.float() for name, value in load_file(aligned).items()})
    return lora_parameters(add_lora(teaching.base.flux, task.rank, 0, task.recipe.seed))


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The command line; returns the losses."""
    parser = argparse.ArgumentParser(description="Train USO's projector or LoRA on FLUX.1.")
    parser.add_argument("stage", choices=tuple(OUTPUT))
    parser.add_argument("--models", type=Path, help="a ComfyUI folder or its models folder")
    parser.add_argument("--work", type=Path, default=Path("training-full"))
    parser.add_argument("--side", type=int, default=512, help="of the pictures, in pixels, a multiple of 16")
    parser.add_argument("--fp8", action="store_true", help="hold the base's blocks in fp8")
    parser.add_argument("--lessons", type=int, default=2000, help="triplets of each use")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1, help="per process")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=128, help="of the LoRA")
    parser.add_argument("--style-tokens", type=int, default=64, help="per level of the projector")
    said = parser.parse_args(arguments)
    workshop = Workshop(said.work, Plan.read(None))
    try:
        recipe = Recipe(said.samples, said.batch, said.rate, warmup=min(500, said.samples // 10))
        task = Task(
            said.stage, said.models, workshop, said.side, said.fp8, said.lessons, said.style_tokens,
            said.rank, recipe,
        )  # fmt: skip
    except (ValueError, UsoflowError) as error:
        parser.error(str(error))
    check_writable(said.work, "--work")
    # The others wait while one process reads, draws and encodes: longer than they would by default.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return run(task, Accelerator(mixed_precision="no", kwargs_handlers=[patient]))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("usoflow").setLevel(logging.INFO)
    try:
        with want_of_memory_told("Use --fp8, a smaller --side, or a card with more memory."):
            main()
    except UsoflowError as error:
        print(f"error: {error.detail}\n{error.remedy}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a folder that cannot be written to, a full disk
        print(f"error: {error.filename or 'a file'}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)

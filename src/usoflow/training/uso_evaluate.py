"""Does USO keep the subject and apply the style? What `usoflow evaluate` measures, on any model folder.

Questions are lessons with held-out subjects and seen or held-out styles (`questions`); `Contender` answers
them from the files of a folder, through the ordinary loaders and encoders, in batches; `marks` are what the
judge says (`uso_judge`). Beside a contender's marks stand those of the real targets (ceiling), of the
reference given back (the cheat), and chance. Ablations are the same contender with a part left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux import Flux, FluxInputs
from usoflow.models.flux_config import runs
from usoflow.models.inventory import found_files
from usoflow.models.kinds import KIND_NAMES
from usoflow.models.latent_format import LatentFormat
from usoflow.models.library import ModelLibrary
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.placement import is_out_of_memory
from usoflow.settings import Folders
from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.base import METHOD
from usoflow.training.drawings import Sprites
from usoflow.training.scenes import Scene, pictures_of
from usoflow.training.text_to_image import STEPS, euler, levels_of
from usoflow.training.triplets import (
    CONTENT_RENDERED,
    RENDERED,
    Cast,
    Styles,
    Triplet,
    Use,
    draw_triplet,
    seen_styles,
)
from usoflow.training.uso_judge import UsoJudge, Verdict, known_subjects, layout_of, style_name, styles_of
from usoflow.training.world import World

CellName = Literal["subject", "style seen", "style held out", "both", "both, style held out"]
QUESTION_SEED = 990_004
SAMPLE_SEED = 990_005
BATCH = 25
MOVED = 0.08  # fraction of the side by which place or size must differ
HELD_OUT_RENDERED = 0.75  # of held-out styles: one drawing set and three renderings, each a quarter
NEEDED = ("flux", "clip_l", "t5", "vae", "siglip", "uso_projector", "uso_lora")
ALONE = ("uso_projector", "uso_lora")  # what is measured: of two files the name must not decide


@dataclass(frozen=True, slots=True)
class Cell:
    """One group of questions: what the model is given, and whether the style is a held-out one."""

    use: Use
    held_out_style: bool
    seed: int


CELLS: Mapping[CellName, Cell] = {
    "subject": Cell("subject", held_out_style=False, seed=0),
    "style seen": Cell("style", held_out_style=False, seed=1),
    "style held out": Cell("style", held_out_style=True, seed=2),
    "both": Cell("both", held_out_style=False, seed=3),
    "both, style held out": Cell("both", held_out_style=True, seed=4),
}


def questions(world: World, cell: Cell, count: int) -> list[Triplet]:
    """Lessons that no training saw.

    Subjects of content pictures, and those of style pictures, are held out; the subjects that a style-driven
    prompt names are of the core, since the base must know them by name. Where the content is given alone,
    only lessons count that ask for another place or size.
    """
    held_out = Styles(
        tuple(name for name in world.sets if name in world.held_out),
        tuple(name for name in world.renderings if name in world.held_out),
        HELD_OUT_RENDERED,
    )
    styles = held_out if cell.held_out_style else seen_styles(world, RENDERED)
    subjects = world.core if cell.use == "style" else world.gallery
    cast = Cast(subjects, world.gallery, seen_styles(world, CONTENT_RENDERED), styles)
    drawn = (draw_triplet(cast, QUESTION_SEED + cell.seed, i, cell.use) for i in itertools.count())
    asked = (t for t in drawn if cell.use != "subject" or t.target.placed != t.content.placed)
    return list(itertools.islice(asked, count))


@dataclass(frozen=True, slots=True)
class Given:
    """What of the references a model is really given; an ablation leaves something out."""

    lora: bool = True
    style: bool = True
    right_content: bool = True


def contenders(use: Use) -> dict[str, Given]:
    """The whole model first, then what can be left out of it where it is given `use`."""
    rows = {"whole": Given(), "no LoRA": Given(lora=False)}
    if use != "subject":
        rows["no projector"] = Given(style=False)
    if use != "style":
        rows["wrong reference"] = Given(right_content=False)
    return rows


def components_of(folders: Folders, needed: Sequence[str]) -> dict[str, Component]:
    """The first component of each kind that is needed among the files of the model folders, by its kind.

    Of transformers the first that can be run: FLUX.1's tools, which cannot, may lie beside it.

    Raises:
        UsoflowError: `model_missing` naming the kinds of which there is none, `request_invalid` naming two
            files of a kind that must be `ALONE`.
    """
    found: dict[str, Component] = {}
    for file in found_files(folders):
        if not file.problem:
            for kind, component in TensorFile.open(file.path).components().items():
                if kind not in found or (kind == "flux" and not runs(found[kind])):
                    found[kind] = component
                elif kind in ALONE and kind in needed:
                    _refuse_another(found[kind], component)
    missing = [KIND_NAMES[kind] for kind in needed if kind not in found]
    if missing:
        raise UsoflowError("model_missing", f"The model folders hold no {', no '.join(missing)}.")
    return {kind: found[kind] for kind in needed}


def _refuse_another(first: Component, second: Component) -> None:
    one, other = first.file.path, second.file.path
    if not one.samefile(other):  # a folder or a file may be found twice
        raise UsoflowError(
            "request_invalid",
            f"There are two files with a {KIND_NAMES[first.kind]}: {one} and {other}.",
            remedy="Keep one of them in the folder.",
        )


@dataclass(frozen=True)
class Contender:
    """The models of a folder, and how large pictures are made.

    Attributes:
        library: where modules come from.
        side: of the pictures.
        parts: the files' components, by kind: all of `NEEDED`.
    """

    library: ModelLibrary
    side: int
    parts: Mapping[str, Component]

    @classmethod
    def of(cls, folders: Folders, library: ModelLibrary, *, side: int) -> Contender:
        """The first component of each kind among the files of the model folders.

        Raises:
            UsoflowError: `model_missing`, `request_invalid`: see `components_of`.
        """
        return cls(library, side, components_of(folders, NEEDED))

    @property
    def files(self) -> list[Path]:
        """Whose components they are."""
        return list(dict.fromkeys(part.file.path for part in self.parts.values()))

    def answer(self, sprites: Sprites, asked: Sequence[Triplet], given: Given) -> Tensor:
        """One picture for each question, [N, side, side, 3] in 0..1: euler, simple, 20 steps, cfg 1."""
        shown = _with_wrong_content(asked) if not given.right_content else list(asked)
        edge = self.side // 8
        made = []
        for number, first in enumerate(range(0, len(shown), BATCH)):
            batch = shown[first : first + BATCH]
            generator = torch.Generator().manual_seed(SAMPLE_SEED + number)
            noise = torch.randn(len(batch), 16, edge, edge, generator=generator)
            made.append(self._fitting(sprites, batch, given, noise))
        return torch.cat(made)

    def _fitting(self, sprites: Sprites, asked: Sequence[Triplet], given: Given, noise: Tensor) -> Tensor:
        """The same pictures in as many parts as memory asks for."""
        try:
            return self._batch(sprites, asked, given, noise)
        except Exception as error:
            if len(asked) == 1 or not is_out_of_memory(error):
                raise
        half = len(asked) // 2  # beyond the `except`, whose error would keep what did not fit
        first = self._fitting(sprites, asked[:half], given, noise[:half])
        return torch.cat([first, self._fitting(sprites, asked[half:], given, noise[half:])])

    @torch.inference_mode()
    def _batch(self, sprites: Sprites, asked: Sequence[Triplet], given: Given, noise: Tensor) -> Tensor:
        placement = self.library.placement
        inputs = self._inputs(sprites, asked, given)  # first: encoders may come in the transformer's place
        flux = self._flux(given)
        levels = levels_of(STEPS).to(placement.device)
        x = euler(noise.to(placement.device), levels, lambda x, sigma: flux(x, sigma, inputs))
        return self.library.vae_decode(
            self.parts["vae"], LatentFormat.from_component(self.parts["flux"]).from_model(x)
        ).cpu()

    def _inputs(self, sprites: Sprites, asked: Sequence[Triplet], given: Given) -> FluxInputs:
        """What the transformer is told of a batch; longer prompts than the longest usual one are cut."""
        placement, device = self.library.placement, self.library.placement.device
        texts = [self.library.encode_text(self.parts["clip_l"], self.parts["t5"], t.prompt) for t in asked]
        length = min(text.context.shape[1] for text in texts)
        context = torch.cat([text.context[:, :length] for text in texts]).to(device)
        pooled = torch.cat([text.pooled for text in texts]).to(device)
        use = asked[0].use
        content = [self._latents(sprites, [t.content for t in asked])] if use != "style" else []
        style = self._style(sprites, [t.style for t in asked]) if use != "subject" and given.style else None
        edge = self.side // 8
        return self._flux(given).prepare(
            context, pooled, (edge, edge), batch=len(asked), references=content, method=METHOD, style=style,
            dtype=placement.dtype,
        )  # fmt: skip

    def _flux(self, given: Given) -> Flux:
        loras = (LoraUse(self.parts["uso_lora"], 1.0),) if given.lora else ()
        return self.library.flux(self.parts["flux"], loras, "default")

    def _latents(self, sprites: Sprites, scenes: Sequence[Scene]) -> Tensor:
        pictures = pictures_of(sprites, scenes, self.side)
        latents = self.library.vae_encode(self.parts["vae"], pictures)
        return (
            LatentFormat.from_component(self.parts["flux"])
            .to_model(latents)
            .to(self.library.placement.device)
        )

    def _style(self, sprites: Sprites, scenes: Sequence[Scene]) -> Tensor:
        pictures = pictures_of(sprites, scenes, self.side)
        seen = self.library.encode_vision(self.parts["siglip"], pictures, "center")
        return self.library.style_tokens(self.parts["uso_projector"], seen.hidden)


def _with_wrong_content(asked: Sequence[Triplet]) -> list[Triplet]:
    """Each question with the content picture of the next."""
    following = (*asked[1:], asked[0])
    return [dataclasses.replace(t, content=n.content) for t, n in zip(asked, following, strict=True)]


Marks = dict[str, float]  # shares, 0..1


@torch.inference_mode()
def marks(judge: UsoJudge, world: World, asked: Sequence[Triplet], pictures: Tensor) -> Marks:
    """What the judge finds in the pictures made for some questions.

    Returns:
        subject: right among 100 (held-out ones; for a style-driven prompt, the core's); style: right of all;
        background: right of all; moved: place or size differs from the content's; leaked: the style picture's
        own subject comes first among 100; and the shares that are right in all that counts for the use.
    """
    verdict = judge(pictures)
    right = {name: part(world, asked, verdict) for name, part in PARTS.items()}
    use = asked[0].use
    counted = {
        "subject": ("subject", "background", "moved"),
        "style": ("style",),
        "both": ("subject", "style"),
    }
    together = torch.stack([right[name] for name in counted[use]]).all(dim=0)
    return {
        name: round(float(found.float().mean()), 4) for name, found in (right | {"all": together}).items()
    }


def _subject(world: World, asked: Sequence[Triplet], verdict: Verdict) -> Tensor:
    names, gallery = known_subjects(world), len(world.gallery)
    style_driven = asked[0].use == "style"
    logits = verdict.subject[:, gallery:] if style_driven else verdict.subject[:, :gallery]
    first = gallery if style_driven else 0
    wanted = torch.tensor([names.index(t.target.placed[0].subject, first) - first for t in asked])
    return logits.argmax(dim=1) == wanted


def _style(world: World, asked: Sequence[Triplet], verdict: Verdict) -> Tensor:
    return verdict.style.argmax(dim=1) == torch.tensor(
        [styles_of(world).index(style_name(t.target)) for t in asked]
    )


def _background(world: World, asked: Sequence[Triplet], verdict: Verdict) -> Tensor:
    names = list(BACKGROUNDS)
    return verdict.background.argmax(dim=1) == torch.tensor([names.index(t.target.background) for t in asked])


def _moved(world: World, asked: Sequence[Triplet], verdict: Verdict) -> Tensor:
    before = torch.tensor([layout_of(t.content) for t in asked])
    return ((verdict.layout - before).abs() > MOVED).any(dim=1)


def _leaked(world: World, asked: Sequence[Triplet], verdict: Verdict) -> Tensor:
    gallery = verdict.subject[:, : len(world.gallery)]
    return gallery.argmax(dim=1) == torch.tensor(
        [world.gallery.index(t.style.placed[0].subject) for t in asked]
    )


PARTS: Mapping[str, Callable[[World, Sequence[Triplet], Verdict], Tensor]] = {
    "subject": _subject,
    "style": _style,
    "background": _background,
    "moved": _moved,
    "leaked": _leaked,
}


def chance(world: World, use: Use) -> Marks:
    """Of an answer that knows nothing; for `moved` there is none."""
    subject = 1 / (len(world.core) if use == "style" else len(world.gallery))
    style, background = 1 / len(styles_of(world)), 1 / len(BACKGROUNDS)
    together = {"subject": subject * background, "style": style, "both": subject * style, "text": 0.0}
    leaked = 1 / len(world.gallery)
    found = {"subject": subject, "style": style, "background": background, "leaked": leaked}
    return {name: round(value, 4) for name, value in (found | {"all": together[use]}).items()}


def bounds(judge: UsoJudge, sprites: Sprites, asked: Sequence[Triplet], side: int) -> dict[str, Marks]:
    """Marks of the real targets, of the reference given back, and of chance."""
    use = asked[0].use
    pasted = [t.style if use == "style" else t.content for t in asked]
    shown = {"real target": [t.target for t in asked], "reference given back": pasted}
    rows = {
        name: marks(judge, sprites.world, asked, pictures_of(sprites, scenes, side))
        for name, scenes in shown.items()
    }
    return rows | {"chance": chance(sprites.world, use)}

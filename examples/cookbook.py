"""Draws the pictures of the cookbook with the models of a folder, and puts them on its pages.

    python examples/cookbook.py                        # the pocket models of the package
    python examples/cookbook.py --models ~/ComfyUI --size 1024

Subject and style are the robot and the blueprint beside this file, unless --subject and --style name others.
The pages with references need USO's LoRA and projector and SigLIP beside the checkpoint; without these they
are left as they are, and it says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

import usoflow
from usoflow.api.official import Request, build
from usoflow.api.sheet import contact_sheet
from usoflow.models.inventory import found_files
from usoflow.settings import POCKET_MODELS, find_folders

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "cookbook"
PROMPTS = (
    "a red apple on a chessboard, flat style",
    "a penguin on a green background, twemoji style",
    "a rocket in the night sky, flat style",
    "a frog on a beach, twemoji style",
    "a hamburger under water, flat style",
    "an owl in the snow, emojione style",
    "a strawberry at sunset, blob style",
    "a cactus on red stripes, emojione style",
)
SUBJECT, STYLE = HERE / "robot.png", HERE / "blueprint.png"
LARGEST_SUBJECT = 512  # pixels; as USO was trained
CFG = 1.7  # of the pocket model, for words alone
CHECKPOINT = "CheckpointLoaderSimple.ckpt_name"
# The loaders' fields; in which folder their files are, and what these hold, in the inventory's words.
LOADERS = {
    CHECKPOINT: (
        "checkpoints", ("FLUX.1 transformer", "CLIP-L text encoder", "T5 text encoder", "FLUX VAE")
    ),
    "LoraLoaderModelOnly.lora_name": ("loras", ("USO DiT LoRA",)),
    "ModelPatchLoader.name": ("model_patches", ("USO style projector",)),
    "CLIPVisionLoader.clip_name": ("clip_vision", ("SigLIP vision tower",)),
}  # fmt: skip

Labelled = list[tuple[str, Image.Image]]


@dataclass
class Studio:
    """An engine, and how pictures are asked of it.

    Attributes:
        engine: keeps the models.
        names: the loaders' fields and the files for them.
        size: of the pictures, which are square.
        steps: of the sampler, unless a page says otherwise.
        place: a folder for what is drawn on the way.
        subject, style: the pictures that are given.
    """

    engine: usoflow.Engine
    names: Mapping[str, str]
    size: int
    steps: int
    place: Path
    subject: Path
    style: Path

    @property
    def has_uso(self) -> bool:
        """Whether the pages with references can be drawn."""
        return set(self.names) == set(LOADERS)

    def draw(self, request: Request, steps: int | None = None) -> Image.Image:
        """One picture: by the official graph, or, of words alone, by the plain one."""
        side = min(LARGEST_SUBJECT, self.size) if request.subjects else None
        request = replace(request, size=(self.size, self.size), subject_size=side, steps=steps or self.steps)
        referring = bool(request.subjects or request.styles)
        workflow = build(request) if referring else plain(request, self.size)
        for target, name in self.names.items():
            if referring or target == CHECKPOINT:
                workflow = workflow.set(target, name)
        return self.engine.run(workflow).images[0]


def plain(request: Request, size: int) -> usoflow.Workflow:
    """Text to image without references."""
    workflow = usoflow.Workflow.load(HERE / "pocket.json").with_seed(request.seed)
    values = {
        "text.text": request.prompt,
        "EmptySD3LatentImage.width": size,
        "EmptySD3LatentImage.height": size,
        "KSampler.steps": request.steps,
        "KSampler.cfg": request.guidance,
    }
    for target, value in values.items():
        workflow = workflow.set(target, value)
    return workflow


def text(studio: Studio) -> Labelled:
    return [(prompt.rpartition(",")[0], studio.draw(Request(prompt, guidance=CFG))) for prompt in PROMPTS]


def seeds(studio: Studio) -> Labelled:
    return [
        (f"seed {seed}", studio.draw(Request(PROMPTS[1], seed=seed, guidance=CFG))) for seed in range(7, 15)
    ]


def sweep(studio: Studio) -> Labelled:
    found = []
    for steps in (max(1, studio.steps // 5), studio.steps):
        for guidance in (1.0, 1.7, 2.5, 3.5):
            picture = studio.draw(Request(PROMPTS[0], guidance=guidance), steps)
            found.append((f"steps {steps} · cfg {guidance}", picture))
    return found


def inpaint(studio: Studio) -> Labelled:
    """The middle of a picture, made anew from other words."""
    before, mask = studio.place / "before.png", studio.place / "mask.png"
    studio.draw(Request("an owl in the snow, flat style", guidance=CFG)).save(before)
    drawn = Image.new("RGB", (studio.size, studio.size))
    ImageDraw.Draw(drawn).ellipse([studio.size // 6] * 2 + [studio.size * 5 // 6] * 2, fill="white")
    drawn.save(mask)
    workflow = usoflow.Workflow.load(HERE / "inpaint.json").with_seed(3)
    workflow = workflow.set(CHECKPOINT, studio.names[CHECKPOINT]).set("text.text", "a red apple in the snow")
    workflow = workflow.set("KSampler.denoise", 1.0).set("KSampler.steps", studio.steps)
    workflow = workflow.with_picture("picture", before).with_picture("mask", mask)
    after = studio.engine.run(workflow).images[0]
    return [("picture", Image.open(before)), ("mask", drawn), ("a red apple in the snow", after)]


def referring(prompt: str, *, subject: bool = False, style: bool = False) -> Callable[[Studio], Labelled]:
    """A page with references: what is given, and what comes out."""

    def draw(studio: Studio) -> Labelled:
        subjects = (studio.subject,) if subject else ()
        styles = (studio.style,) if style else ()
        given = [("subject", path) for path in subjects] + [("style", path) for path in styles]
        made = studio.draw(Request(prompt, subjects=subjects, styles=styles))
        shown = [(name, Image.open(path).resize(made.size)) for name, path in given]
        return [*shown, (prompt or "without words", made)]

    return draw


# Page, picture, what draws it, whether it needs USO.
PICTURES: tuple[tuple[str, str, Callable[[Studio], Labelled], bool], ...] = (
    ("text.md", "text.png", text, False),
    ("many.md", "seeds.png", seeds, False),
    ("many.md", "sweep.png", sweep, False),
    ("inpaint.md", "inpaint.png", inpaint, False),
    ("subject.md", "subject.png", referring("a robot on the left in a forest", subject=True), True),
    ("style.md", "style.png", referring("a rocket in a meadow", style=True), True),
    ("both.md", "both.png", referring("a robot on the left in a meadow", subject=True, style=True), True),
    ("layout.md", "layout.png", referring("", subject=True, style=True), True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the cookbook.")
    parser.add_argument("--models", type=Path, default=POCKET_MODELS)
    parser.add_argument("--pages", type=Path, default=PAGES, help="the folder of the cookbook")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--subject", type=Path, default=SUBJECT)
    parser.add_argument("--style", type=Path, default=STYLE)
    options = parser.parse_args()
    if not options.pages.is_dir():
        parser.error(f"--pages {options.pages} is no folder.")
    with (
        tempfile.TemporaryDirectory() as place,
        usoflow.Engine(models=options.models, output=place) as engine,
    ):
        names = dict(loaders(options.models))
        if CHECKPOINT not in names:
            sys.exit(f"{options.models} has no checkpoint that holds FLUX.1, text encoders and VAE.")
        studio = Studio(
            engine, names, options.size, options.steps, Path(place), options.subject, options.style
        )
        for page, picture, draw, needs_uso in PICTURES:
            if needs_uso and not studio.has_uso:
                print(f"{page}: not drawn, there is no USO in {options.models}")
                continue
            labelled = draw(studio)
            sheet = contact_sheet(labelled, columns=min(4, len(labelled)))
            sheet.quantize(256).save(options.pages / picture, optimize=True)
            show(options.pages / page, picture)
            print(f"{page}: {options.pages / picture}")


def loaders(models: Path) -> Iterator[tuple[str, str]]:
    """The first file for each loader that there is."""
    files = list(found_files(find_folders(models=models)))
    for target, (folder, kinds) in LOADERS.items():
        names = [f.name for f in files if f.folder == folder and all(kind in f.contents for kind in kinds)]
        if names:
            yield target, names[0]


def show(page: Path, picture: str) -> None:
    """Put a picture below the page's title, unless it is on the page."""
    content = page.read_text()
    if f"]({picture})" not in content:
        title, _, rest = content.partition("\n")
        alt = picture.removesuffix(".png")
        page.write_text(f"{title}\n\n![{alt}]({picture})\n{rest}")


if __name__ == "__main__":
    try:
        main()
    except usoflow.UsoflowError as error:
        sys.exit(f"error: {error.detail}\n{error.remedy}")

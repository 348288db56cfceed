"""The official USO workflow for what somebody wants: subject, style, both, or text alone.

The template `flux1_dev_uso_reference_image_gen` holds two halves, each a subgraph: one for a subject (and
styles), one for styles alone. As one does in the editor, the half that is not needed is bypassed (Ctrl+B),
values are filled in, and EasyCache or further LoRAs are put in front of the sampler. So the UI graph in the
picture opens as the official workflow.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from usoflow.api.graph import Graph
from usoflow.api.workflow import Workflow, free_name
from usoflow.errors import UsoflowError

TEMPLATE: Final = "flux1_dev_uso_reference_image_gen"
MOST_STYLES: Final = 2  # places for style pictures in the template
DEFAULT_GUIDANCE: Final = 3.5  # where a conditioning sets none, the model's own
RANDOM_SEEDS: Final = 2**32  # one that nobody chose is short enough to be typed again
STEP: Final = 16  # sides of a picture are multiples of it: two latents
LAYOUT_NOTE: Final = (
    "An empty prompt with subject and style keeps the layout of the subject's picture"
    " and changes its style only."
)


@dataclass(frozen=True, slots=True)
class Request:
    """What `usoflow generate` is asked for. Defaults are the template's.

    Attributes:
        prompt: what the picture shows; may be empty with subject and style, see `LAYOUT_NOTE`.
        subject: a picture whose subject is kept.
        styles: pictures whose style is taken, two at most.
        size: width and height in pixels, multiples of 16.
        steps: of the sampler.
        guidance: strength of FLUX's built-in guidance.
        seed: 0..2**64 - 1.
        subject_size: the longer side that the subject's picture is scaled to before it is encoded.
        keep_size: give the picture the proportions of the subject's, in as many pixels as `size` has.
        easycache: threshold below which steps are skipped; None skips none.
        loras: file in the loras folder and strength, besides USO's own.
    """

    prompt: str
    subject: Path | None = None
    styles: tuple[Path, ...] = ()
    size: tuple[int, int] = (1024, 1024)
    steps: int = 20
    guidance: float = DEFAULT_GUIDANCE
    seed: int = 0
    subject_size: int = 512
    keep_size: bool = False
    easycache: float | None = None
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the picture that this gives."""
        layout = not self.prompt.strip() and self.subject is not None and self.styles
        return (LAYOUT_NOTE,) if layout else ()


@dataclass(frozen=True, slots=True)
class _Half:
    """Node ids of one half of the template: those at the top, those within its subgraph.

    `styles` are pairs of a style reference and its LoadImage, in the order of the chain; the LoadImages are
    in the subgraph or, where `loaders_on_top`, outside.
    """

    host: int
    save: int
    text: int
    latent: int
    sampler: int
    styles: tuple[tuple[int, int], ...]
    loaders_on_top: bool


_SUBJECT: Final = _Half(112, 9, 6, 110, 31, ((55, 53), (56, 46)), loaders_on_top=False)
_STYLE: Final = _Half(113, 73, 90, 87, 78, ((89, 88), (83, 91)), loaders_on_top=True)
_SUBJECT_LOADER, _SUBJECT_SCALE, _REFERENCE, _REFERENCE_GUIDANCE = 47, 109, 57, 35


def build(request: Request) -> Workflow:
    """The workflow for a request.

    Raises:
        UsoflowError: `request_invalid`, `image_missing`, `image_invalid`.
    """
    _refuse(request)
    from usoflow.workflow.loading import template

    graph = Graph(copy.deepcopy(template(TEMPLATE)))
    pictures = _name_pictures(request)
    names = {path: name for name, path in pictures.items()}
    half = _SUBJECT if request.subject else _STYLE
    _switch(graph, half, len(request.styles))
    _fill_in(graph, half, request)
    inner = graph.subgraph(half.host)
    for (_, loader), path in zip(half.styles, request.styles, strict=False):
        (graph if half.loaders_on_top else inner).set_values(loader, {0: names[path]})
    if request.subject:
        graph.set_values(_SUBJECT_LOADER, {0: names[request.subject]})
        inner.set_values(_SUBJECT_SCALE, {1: request.subject_size})
    _insert(inner, half, request)
    return _loaded(graph.data, pictures)


def output_size(request: Request) -> tuple[int, int]:
    """Width and height of the picture.

    Raises:
        UsoflowError: `image_missing`, `image_invalid`.
    """
    if not (request.keep_size and request.subject):
        return request.size
    width, height = _picture_size(request.subject)
    pixels = request.size[0] * request.size[1]
    sides = ((pixels * width / height) ** 0.5, (pixels * height / width) ** 0.5)
    wide, high = (max(STEP, round(side / STEP) * STEP) for side in sides)
    return wide, high


def _refuse(request: Request) -> None:
    problem = None
    if len(request.styles) > MOST_STYLES:
        problem = f"{len(request.styles)} style pictures; the official workflow has places for {MOST_STYLES}"
    elif any(side % STEP or side < STEP for side in request.size):
        problem = f"a size of {request.size[0]}x{request.size[1]}; sides must be multiples of {STEP}"
    elif request.keep_size and request.subject is None:
        problem = "keep-size without a subject"
    if problem:
        raise UsoflowError("request_invalid", f"The request has {problem}.")


def _switch(graph: Graph, half: _Half, styles: int) -> None:
    """Bypass the other half and the places for style pictures that stay empty; the rest is active."""
    used = half is _SUBJECT
    graph.set_active(used, _SUBJECT.host, _SUBJECT.save, _SUBJECT_LOADER)
    graph.set_active(not used, _STYLE.host, _STYLE.save)
    inner = graph.subgraph(half.host)
    for place, (style, loader) in enumerate(half.styles):
        inner.set_active(place < styles, style)
        (graph if half.loaders_on_top else inner).set_active(place < styles, loader)
    if used:
        graph.set_active(False, *(loader for _, loader in _STYLE.styles))


def _fill_in(graph: Graph, half: _Half, request: Request) -> None:
    """Values that the subgraph's node shows, there and within; then those that only its nodes have."""
    width, height = output_size(request)
    graph.set_values(half.host, {0: request.prompt, 1: width, 2: height, 3: request.seed})
    inner = graph.subgraph(half.host)
    inner.set_values(half.text, {0: request.prompt})
    inner.set_values(half.latent, {0: width, 1: height})
    inner.set_values(half.sampler, {0: request.seed, 2: request.steps})
    if half is _SUBJECT:
        inner.set_values(_REFERENCE, {0: request.guidance})
        inner.subgraph(_REFERENCE).set_values(_REFERENCE_GUIDANCE, {0: request.guidance})


def _insert(inner: Graph, half: _Half, request: Request) -> None:
    """What the template does not have, in front of the sampler."""
    if half is _STYLE and request.guidance != DEFAULT_GUIDANCE:
        inner.insert_before(half.sampler, "positive", "FluxGuidance", "conditioning", [request.guidance])
    for file, strength in request.loras:
        inner.insert_before(half.sampler, "model", "LoraLoaderModelOnly", "model", [file, strength])
    if request.easycache is not None:
        values: Sequence[Any] = [request.easycache, 0.15, 0.95, False]
        inner.insert_before(half.sampler, "model", "EasyCache", "model", values)


def _name_pictures(request: Request) -> dict[str, Path]:
    """Pictures by the names that the workflow will use; the same file once."""
    found: dict[str, Path] = {}
    for path in ([request.subject] if request.subject else []) + list(request.styles):
        if not path.is_file():
            raise UsoflowError("image_missing", f"{path} does not exist.", remedy="Check the path.")
        if path not in found.values():
            found[free_name(path.name, found)] = path
    return found


def _loaded(data: dict[str, Any], pictures: dict[str, Path]) -> Workflow:
    from usoflow.nodes import registry
    from usoflow.workflow.loading import load_json

    loaded = load_json(data, registry())
    return Workflow(loaded.prompt, loaded.workflow, pictures=pictures, warnings=loaded.warnings)


def _picture_size(path: Path) -> tuple[int, int]:
    """Width and height as shown, turned as EXIF says."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise UsoflowError("image_invalid", f"{path} cannot be read as a picture.") from None

"""The official USO workflow for what somebody wants: subject, style, both, or text alone.

The template `flux1_dev_uso_reference_image_gen` holds two halves, each a subgraph: one for a subject (and
styles), one for styles alone. As one does in the editor, the half that is not needed is bypassed (Ctrl+B),
values are filled in; EasyCache, further LoRAs, subjects and styles are put in front of the sampler. So the UI
graph in the picture opens as the official workflow.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from usoflow.api.at_hand import TUTORIAL, ModelFiles
from usoflow.api.graph import NODE_SIZE, Graph
from usoflow.api.workflow import Workflow, check_picture, free_name
from usoflow.catalogue import SplitFiles
from usoflow.errors import UsoflowError

TEMPLATE: Final = "flux1_dev_uso_reference_image_gen"
DEFAULT_GUIDANCE: Final = 3.5  # where a conditioning sets none, the model's own
RANDOM_SEEDS: Final = 2**32  # one that nobody chose is short enough to be typed again
STEP: Final = 16  # sides of a picture are multiples of it: two latents
LAYOUT_NOTE: Final = (
    "An empty prompt with subject and style keeps the layout of the subject's picture"
    " and changes its style only."
)


@dataclass(frozen=True, slots=True)
class Request:
    """What `usoflow generate` is asked for. Defaults are the template's; sizes that are None are the model's.

    Attributes:
        prompt: what the picture shows; may be empty with subject and style, see `LAYOUT_NOTE`.
        subjects: pictures whose subjects are kept.
        styles: pictures whose style is taken.
        size: width and height in pixels, multiples of 16.
        steps: of the sampler.
        guidance: strength of FLUX's built-in guidance.
        seed: 0..2**64 - 1.
        subject_size: the longer side that a subject's picture is scaled to before it is encoded.
        keep_size: give the picture the proportions of the first subject's, in as many pixels as `size` has.
        easycache: threshold below which steps are skipped; None skips none.
        loras: file in the loras folder and strength, besides USO's own.
    """

    prompt: str
    subjects: tuple[Path, ...] = ()
    styles: tuple[Path, ...] = ()
    size: tuple[int, int] | None = None
    steps: int = 20
    guidance: float = DEFAULT_GUIDANCE
    seed: int = 0
    subject_size: int | None = None
    keep_size: bool = False
    easycache: float | None = None
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the picture that this gives."""
        layout = not self.prompt.strip() and self.subjects and self.styles
        return (LAYOUT_NOTE,) if layout else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """Node ids of one half of the template: those at the top, those within its subgraph.

    `styles` are pairs of a style reference and its LoadImage, in the order of the chain; the LoadImages are
    in the subgraph or, where `loaders_on_top`, outside. `free` is a place below everything in the subgraph.
    """

    host: int
    save: int
    text: int
    latent: int
    sampler: int
    checkpoint: int
    decode: int
    lora: int
    patch: int
    vision: int
    styles: tuple[tuple[int, int], ...]
    loaders_on_top: bool
    free: tuple[int, int]


_SUBJECT: Final = _Half(
    host=112, save=9, text=6, latent=110, sampler=31, checkpoint=30, decode=8, lora=43, patch=39, vision=40,
    styles=((55, 53), (56, 46)), loaders_on_top=False, free=(-700, 1400),
)  # fmt: skip
_STYLE: Final = _Half(
    host=113, save=73, text=90, latent=87, sampler=78, checkpoint=72, decode=77, lora=76, patch=75, vision=74,
    styles=((89, 88), (83, 91)), loaders_on_top=True, free=(-700, 2700),
)  # fmt: skip
# What the ids stand for, see `_ids`: that of comfyui-workflow-templates-json 0.1.30 to 0.1.123.
_IDS: Final = "9d781ff22b5e"
_TEMPLATES: Final = "comfyui-workflow-templates-json"
_KNOWN_TEMPLATES: Final = f"{_TEMPLATES}==0.1.123"
_ON_ITS_SIDE: Final = range(5, 9)  # of EXIF's orientations
_FIRST_NAME: Final = 4  # of a model file, among the values that a subgraph's node shows
_CLIP, _VAE = 1, 2  # outputs of the checkpoint's loader
_COLUMN, _ROW = NODE_SIZE[0] + 50, 400  # a LoadImage that shows its picture is higher than others
_SUBJECT_LOADER, _SUBJECT_SCALE, _REFERENCE, _REFERENCE_GUIDANCE = 47, 109, 57, 35


def build(request: Request, files: ModelFiles = TUTORIAL) -> Workflow:
    """The workflow for a request, its loaders given these files.

    Raises:
        UsoflowError: `request_invalid`, `image_missing`, `image_invalid`.
    """
    request = _sized(request, files)
    _refuse(request)
    graph = Graph(adapted(files))
    pictures = _name_pictures(request)
    names = {path: name for name, path in pictures.items()}
    half = _SUBJECT if request.subjects else _STYLE
    _switch(graph, half, len(request.styles))
    _fill_in(graph, half, request)
    inner = graph.subgraph(half.host)
    for (_, loader), path in zip(half.styles, request.styles, strict=False):
        (graph if half.loaders_on_top else inner).set_values(loader, {0: names[path]})
    if request.subjects:
        graph.set_values(_SUBJECT_LOADER, {0: names[request.subjects[0]]})
        inner.set_values(_SUBJECT_SCALE, {1: request.subject_size})
    _insert_pictures(inner, half, request, names)
    _insert(inner, half, request)
    return _loaded(graph.data, pictures, files.notes)


def adapted(files: ModelFiles) -> dict[str, Any]:
    """The template with the names of these files and the sizes that their transformer was trained for.

    Raises:
        UsoflowError: `template_unknown` where the installed templates have another one.
    """
    from usoflow.workflow.loading import template

    official = template(TEMPLATE)
    if _ids(official) != _IDS:
        raise UsoflowError(
            "template_unknown",
            f"The USO template of the installed {_TEMPLATES} is not the one that this usoflow fills in.",
            remedy=f"pip install {_KNOWN_TEMPLATES}",
        )
    graph = Graph(copy.deepcopy(official))
    for half in (_SUBJECT, _STYLE):
        _name_models(graph, half, files)
        if files.split:
            _split(graph, half, files.split)
        graph.set_values(half.host, {1: files.side, 2: files.side})
        graph.subgraph(half.host).set_values(half.latent, {0: files.side, 1: files.side})
    graph.subgraph(_SUBJECT.host).set_values(_SUBJECT_SCALE, {1: files.subject_side})
    return graph.data


def _ids(graph: Mapping[str, Any]) -> str:
    """A digest of every node's id and type, and of how many values it has."""
    levels = [graph, *graph["definitions"]["subgraphs"]]
    found = [
        sorted(f"{n['id']} {n['type']} {len(n.get('widgets_values') or [])}" for n in level["nodes"])
        for level in levels
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[: len(_IDS)]


def _sized(request: Request, files: ModelFiles) -> Request:
    """The request with every size told that counts."""
    side = files.subject_side if request.subjects else None
    return replace(
        request,
        size=(files.side, files.side) if request.size is None else request.size,
        subject_size=side if request.subject_size is None else request.subject_size,
    )


def output_size(request: Request) -> tuple[int, int]:
    """Width and height of the picture of a request that tells its size.

    Raises:
        UsoflowError: `image_missing`, `image_invalid`.
    """
    assert request.size is not None
    if not (request.keep_size and request.subjects):
        return request.size
    width, height = _picture_size(request.subjects[0])
    pixels = request.size[0] * request.size[1]
    sides = ((pixels * width / height) ** 0.5, (pixels * height / width) ** 0.5)
    wide, high = (max(STEP, round(side / STEP) * STEP) for side in sides)
    return wide, high


def _refuse(request: Request) -> None:
    problem = None
    if not isinstance(request.prompt, str):  # a field that JSON lacks, say
        problem = f'The prompt is {request.prompt!r}; it must be a text, "" for none.'
    elif request.steps is None or request.guidance is None:
        problem = "Steps or guidance are None: leave out what is not asked for."
    elif not _is_size(request.size):
        problem = f"Size {request.size!r}: it must be (width, height) in pixels."
    elif request.size and any(side % STEP or side < STEP for side in request.size):
        problem = f"Size {request.size[0]}x{request.size[1]}: both sides must be multiples of {STEP}."
    elif request.keep_size and not request.subjects:
        problem = "keep-size needs a subject."
    elif request.subject_size is not None and not request.subjects:
        problem = "subject-size needs a subject."
    if problem:
        raise UsoflowError("request_invalid", problem)


def _is_size(size: object) -> bool:
    return isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size)


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


def _name_models(graph: Graph, half: _Half, files: ModelFiles) -> None:
    """Of the subgraph's node, which shows the names, and of the loaders within."""
    loaders = {
        "checkpoints": half.checkpoint, "loras": half.lora, "model_patches": half.patch,
        "clip_vision": half.vision,
    }  # fmt: skip
    inner = graph.subgraph(half.host)
    for place, (folder, loader) in enumerate(loaders.items(), start=_FIRST_NAME):
        name = files.names[folder]
        graph.set_values(half.host, {place: name})
        inner.set_values(loader, {0: name})
        if name != TUTORIAL.names[folder]:
            inner.drop_property(loader, "models")  # the editor would ask for the tutorial's file


def _split(graph: Graph, half: _Half, files: SplitFiles) -> None:
    """Loaders of single files instead of the checkpoint's.

    The transformer's takes its place, and so the field that the subgraph's node shows.
    """
    inner = graph.subgraph(half.host)
    left, top = half.free
    encoders = (files.clip_l, files.t5, "flux", "default")
    clip = inner.add("DualCLIPLoader", {}, ("CLIP",), encoders, (left - 2 * _COLUMN, top)), 0
    vae = inner.add("VAELoader", {}, ("VAE",), (files.vae,), (left - 2 * _COLUMN, top + _ROW)), 0
    inner.move_links((half.checkpoint, _CLIP), clip)
    inner.move_links((half.checkpoint, _VAE), vae)
    if files.transformer.endswith(".gguf"):
        inner.retype(half.checkpoint, "UnetLoaderGGUF", "unet_name", (files.transformer,))
    else:
        inner.retype(half.checkpoint, "UNETLoader", "unet_name", (files.transformer, "default"))
    graph.set_values(half.host, {_FIRST_NAME: files.transformer})
    inner.drop_property(half.checkpoint, "models")


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


def _insert_pictures(inner: Graph, half: _Half, request: Request, names: Mapping[Path, str]) -> None:
    """Subjects and styles for which the template has no place, each in a row of nodes of its own."""
    left, top = half.free
    further = [(path, True) for path in request.subjects[1:]]
    further += [(path, False) for path in request.styles[len(half.styles) :]]
    for row, (path, is_subject) in enumerate(further):
        places = [(left + column * _COLUMN, top + row * _ROW) for column in range(4)]
        picture = inner.add("LoadImage", {}, ("IMAGE", "MASK"), (names[path], "image"), places[0]), 0
        if is_subject:
            size = ("area", request.subject_size)
            small = inner.add("ImageScaleToMaxDimension", {"image": picture}, ("IMAGE",), size, places[1]), 0
            encoded = {"pixels": small, "vae": inner.origin(half.decode, "vae")}
            latent = inner.add("VAEEncode", encoded, ("LATENT",), (), places[2]), 0
            inner.insert_before(
                half.sampler, "positive", "ReferenceLatent", "conditioning", (), {"latent": latent}, places[3]
            )
        else:
            tower = {"clip_vision": (half.vision, 0), "image": picture}
            seen = inner.add("CLIPVisionEncode", tower, ("CLIP_VISION_OUTPUT",), ("center",), places[1]), 0
            others = {"model_patch": (half.patch, 0), "clip_vision_output": seen}
            inner.insert_before(half.sampler, "model", "USOStyleReference", "model", (), others, places[2])


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
    for path in (*request.subjects, *request.styles):
        check_picture(path)
        if path not in found.values():
            found[free_name(path.name, found)] = path
    return found


def _loaded(data: dict[str, Any], pictures: dict[str, Path], notes: tuple[str, ...]) -> Workflow:
    from usoflow.nodes import registry
    from usoflow.workflow.loading import load_json

    loaded = load_json(data, registry())
    warnings = (*notes, *loaded.warnings)
    return Workflow(loaded.prompt, loaded.workflow, pictures=pictures, warnings=warnings)


def _picture_size(path: Path) -> tuple[int, int]:
    """Width and height as shown, turned as EXIF says; no pixel is decoded."""
    from PIL.ExifTags import Base

    from usoflow.nodes.pictures import opened

    with opened(path) as picture:
        width, height = picture.size
        return (height, width) if picture.getexif().get(Base.Orientation) in _ON_ITS_SIDE else (width, height)

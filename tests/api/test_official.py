"""Workflows built from the official template against what the editor exported for the same switches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from usoflow.api.at_hand import TUTORIAL, ModelFiles, at_hand
from usoflow.api.engine import Engine
from usoflow.api.official import LAYOUT_NOTE, TEMPLATE, Request, adapted, build, output_size
from usoflow.api.workflow import Workflow
from usoflow.catalogue import CHECKPOINT, SplitFiles, missing, missing_file_remedy
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.settings import POCKET_MODELS, find_folders
from usoflow.workflow.loading import template

PAIRS = Path(__file__).parents[1] / "pairs"
EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURE = "flux1_dev_uso_reference_image_gen_input_image.png"
GIRL = (
    "A European girl with a heartfelt smile. She is immersed in a vast, endless field of blooming flowers"
    " under a perfect summer sky."
)
MAN = "A man dressed fashionably stands on the forest."


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (80, 48), "red").save(tmp_path / PICTURE)
    return tmp_path / PICTURE


def exported(name: str) -> dict[str, Any]:
    nodes = json.loads((PAIRS / f"{name}.api.json").read_text())
    return {key: (node["class_type"], node["inputs"]) for key, node in nodes.items()}


def built(request: Request) -> dict[str, Any]:
    return {key: (node.class_type, dict(node.inputs)) for key, node in build(request).prompt.nodes.items()}


@pytest.mark.parametrize(
    ("subject", "styles", "expected"),
    [
        (True, 0, "uso_template"),
        (True, 1, "uso_style_one"),
        (True, 2, "uso_style_on"),
        (False, 2, "uso_style_only"),
        (False, 0, "uso_t2i_style_bypassed"),
    ],
)
def test_equals_the_editors_export(picture: Path, subject: bool, styles: int, expected: str) -> None:
    request = Request(
        GIRL if subject else MAN,
        subjects=(picture,) if subject else (),
        styles=(picture,) * styles,
        seed=1058487910949722 if subject else 594838223597516,
    )
    assert built(request) == exported(expected)


@pytest.mark.parametrize("subject", [False, True])
def test_other_files_take_the_places_of_the_tutorials(picture: Path, subject: bool) -> None:
    """In the prompt and in every field of the editor that shows a name."""
    names = {"checkpoints": "a.sft", "loras": "b.sft", "model_patches": "c.sft", "clip_vision": "d.sft"}
    request = Request("x", subjects=(picture,) * subject, styles=(picture,))
    workflow = build(request, ModelFiles(names, notes=("told",)))
    nodes = workflow.prompt.nodes.values()
    loaded = {value for node in nodes for name, value in node.inputs.items() if name.endswith("name")}
    assert set(names.values()) <= loaded | {node.inputs.get("name") for node in nodes}
    assert "told" in workflow.warnings
    assert workflow.ui is not None
    levels = [workflow.ui, *workflow.ui["definitions"]["subgraphs"]]
    fields = [value for level in levels for node in level["nodes"] for value in node["widgets_values"]]
    assert not set(fields) & set(TUTORIAL.names.values())


@pytest.mark.parametrize("name", ["text", "subject", "style", "both"])
def test_the_pocket_graphs_are_the_template_with_other_names_and_sizes(name: str) -> None:
    """But for which nodes are active, nothing else is changed in `examples/pocket`."""

    def active(level: dict[str, Any]) -> dict[str, Any]:
        return level | {"nodes": [node | {"mode": 0} for node in level["nodes"]]}

    def levels(graph: dict[str, Any]) -> list[dict[str, Any]]:
        return [active(level) for level in (graph, *graph["definitions"]["subgraphs"])]

    example = json.loads((EXAMPLES / "pocket" / f"{name}.json").read_text())
    template = adapted(at_hand(find_folders(models=POCKET_MODELS)))
    for found, expected in zip(levels(example), levels(template), strict=True):
        assert found["nodes"] == expected["nodes"]
        assert found["links"] == expected["links"]


def test_a_template_of_which_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates are renewed every week; what is filled in by number must be what it was."""
    other = deepcopy(template(TEMPLATE))
    other["definitions"]["subgraphs"][0]["nodes"][0]["id"] += 1
    monkeypatch.setattr("usoflow.workflow.loading.template", lambda _: other)
    with pytest.raises(UsoflowError) as caught:
        build(Request("a cat"))
    assert caught.value.code == "template_unknown"
    assert caught.value.remedy == "pip install comfyui-workflow-templates-json==0.1.123"


def test_what_is_at_hand(tmp_path: Path) -> None:
    """Of one file that holds the same models; not of two, of which one would have to be chosen."""
    shutil.copytree(POCKET_MODELS, tmp_path, dirs_exist_ok=True)
    found = at_hand(find_folders(models=tmp_path))
    assert set(found.names.values()) == {path.name for path in POCKET_MODELS.rglob("*.safetensors")}
    assert (found.side, found.subject_side, len(found.notes)) == (128, 128, 1)
    lora = next((tmp_path / "loras").iterdir())
    shutil.copy(lora, lora.with_name("another.safetensors"))
    assert at_hand(find_folders(models=tmp_path)).names["loras"] == TUTORIAL.names["loras"]
    lora.rename(lora.with_name(TUTORIAL.names["loras"]))
    assert at_hand(find_folders(models=tmp_path)).names["loras"] == TUTORIAL.names["loras"]


def test_one_style_without_subject_uses_the_first_place(picture: Path) -> None:
    nodes = built(Request("a", styles=(picture,)))
    assert nodes["113:78"][1]["model"] == ["113:89:116", 0]
    assert "91" not in nodes


def test_values_reach_the_prompt(picture: Path) -> None:
    request = Request(
        "hello", subjects=(picture,), size=(640, 320), steps=7, guidance=2.5, seed=11, subject_size=256
    )
    nodes = built(request)
    assert nodes["112:6"][1]["text"] == "hello"
    assert (nodes["112:110"][1]["width"], nodes["112:110"][1]["height"]) == (640, 320)
    assert (nodes["112:31"][1]["steps"], nodes["112:31"][1]["seed"]) == (7, 11)
    assert nodes["112:57:35"][1]["guidance"] == 2.5
    assert nodes["112:109"][1]["largest_size"] == 256


@pytest.mark.parametrize("with_subject", [True, False])
def test_what_the_template_lacks_stands_before_the_sampler(picture: Path, with_subject: bool) -> None:
    request = Request(
        "a", subjects=(picture,) if with_subject else (), styles=(picture,), guidance=2.0, easycache=0.3,
        loras=(("one.safetensors", 0.5), ("two.safetensors", -1.0)),
    )  # fmt: skip
    nodes = built(request)
    sampler = next(inputs for kind, inputs in nodes.values() if kind == "KSampler")
    chain = []
    key = sampler["model"][0]
    while nodes[key][0] != "CheckpointLoaderSimple":
        kind, inputs = nodes[key]
        chain.append((kind, inputs.get("lora_name") or inputs.get("reuse_threshold")))
        key = inputs["model"][0]
    assert chain == [
        ("EasyCache", 0.3),
        ("LoraLoaderModelOnly", "two.safetensors"),
        ("LoraLoaderModelOnly", "one.safetensors"),
        ("USOStyleReference", None),
        ("LoraLoaderModelOnly", "uso-flux1-dit-lora-v1.safetensors"),
    ]
    guidance = nodes[sampler["positive"][0]]
    assert guidance == ("FluxGuidance", {"guidance": 2.0, "conditioning": guidance[1]["conditioning"]})


@pytest.mark.parametrize("with_subject", [True, False])
def test_subjects_and_styles_beyond_the_places_of_the_template(
    picture: Path, tmp_path: Path, with_subject: bool
) -> None:
    """References and styles stand in their order; each picture reaches its own."""
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for file in files:
        file.write_bytes(picture.read_bytes())
    subjects = tuple(files[:3]) if with_subject else ()
    size = 256 if with_subject else None
    nodes = built(Request("a", subjects=subjects, styles=tuple(files[2:]), subject_size=size))
    sampler = next(inputs for kind, inputs in nodes.values() if kind == "KSampler")
    styles = [upstream(nodes, node, "clip_vision_output", "image") for node in chain(nodes, sampler["model"])]
    assert [image for image in styles if image] == ["5.png", "4.png", "3.png", "2.png"]
    references = [
        upstream(nodes, node, "latent", "pixels", "image") for node in chain(nodes, sampler["positive"])
    ]
    assert [image for image in references if image] == (["2.png", "1.png", "0.png"] if with_subject else [])
    sizes = {inputs["largest_size"] for kind, inputs in nodes.values() if kind == "ImageScaleToMaxDimension"}
    assert sizes <= {256}


def chain(nodes: dict[str, Any], link: list[Any]) -> Iterator[dict[str, Any]]:
    """Inputs of the nodes back along `model` or `conditioning`."""
    while True:
        _, inputs = nodes[link[0]]
        yield inputs
        following = inputs.get("model") or inputs.get("conditioning")
        if following is None:
            return
        link = following


def upstream(nodes: dict[str, Any], inputs: dict[str, Any], *names: str) -> str | None:
    """The file of the LoadImage at the end of these links."""
    for name in names:
        if name not in inputs:
            return None
        _, inputs = nodes[inputs[name][0]]
    return inputs["image"]


def test_ids_of_inserted_nodes_and_links_are_new(picture: Path) -> None:
    loras = (("one.safetensors", 0.5), ("two.safetensors", -1.0))
    ui = build(Request("a", subjects=(picture,) * 3, styles=(picture,) * 3, easycache=0.2, loras=loras)).ui
    assert ui is not None
    levels = [ui, *ui["definitions"]["subgraphs"]]
    for level in levels:
        nodes = [node["id"] for node in level["nodes"]]
        links = [link["id"] if isinstance(link, dict) else link[0] for link in level["links"]]
        assert len(set(nodes)) == len(nodes)
        assert len(set(links)) == len(links)
    assert ui["last_node_id"] == max(node["id"] for level in levels for node in level["nodes"])


def test_every_link_is_noted_at_both_ends(picture: Path) -> None:
    """As the editor wants it: the input names the link, the origin's output lists it."""
    ui = build(Request("a", styles=(picture,) * 3, guidance=2.0, easycache=0.2)).ui
    assert ui is not None
    for level in ui["definitions"]["subgraphs"]:
        nodes = {node["id"]: node for node in level["nodes"]}
        for link in level["links"]:
            if link["target_id"] in nodes:
                assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
            if link["origin_id"] in nodes:
                assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]


def test_the_ui_graph_converts_to_the_same_prompt(picture: Path, tmp_path: Path) -> None:
    workflow = build(Request("a", subjects=(picture,), styles=(picture,), easycache=0.2))
    workflow.save(tmp_path / "saved.json")
    assert Workflow.load(tmp_path / "saved.json").to_prompt() == workflow.to_prompt()


def test_pictures_of_one_name_in_two_folders_are_two(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / PICTURE
    Image.new("RGB", (8, 8), "blue").save(other)
    workflow = build(Request("a", subjects=(picture,), styles=(other, picture)))
    names = [workflow.prompt.nodes[key].inputs["image"] for key in ("47", "112:53", "112:46")]
    assert [workflow.pictures[name] for name in names] == [picture, other, picture]


@pytest.mark.parametrize(("size", "expected"), [((1024, 1024), (1328, 800)), ((256, 256), (336, 192))])
def test_keeping_the_proportions(picture: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """80x48 is 5:3; sides are multiples of 16, the number of pixels about that of the size."""
    wide, high = output_size(Request("a", subjects=(picture,), size=size, keep_size=True))
    assert (wide, high) == expected
    assert abs(wide / high / (80 / 48) - 1) < 0.06


def test_a_turned_photo_keeps_the_proportions_that_one_sees(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (80, 48)).save(tmp_path / "turned.jpg", exif=exif)
    wide, high = output_size(
        Request("a", subjects=(tmp_path / "turned.jpg",), size=(1024, 1024), keep_size=True)
    )
    assert wide < high


def test_the_note_about_layout(picture: Path) -> None:
    request = Request("", subjects=(picture,), styles=(picture,))
    assert request.notes == (LAYOUT_NOTE,)
    assert not replace(request, prompt="a").notes
    assert not replace(request, styles=()).notes


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (1000, 1024)},
        {"size": (0, 16)},
        {"size": "128x128"},
        {"size": 128},
        {"size": (128, 128, 1)},
        {"keep_size": True, "subjects": ()},
        {"subject_size": 256, "subjects": ()},
    ],
)
def test_what_cannot_be_asked_for(picture: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsoflowError) as caught:
        build(Request("a", **{"subjects": (picture,), **wrong}))
    assert caught.value.code == "request_invalid"


def test_missing_and_broken_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsoflowError) as caught:
        build(Request("a", subjects=(tmp_path / "none.png",)))
    assert caught.value.code == "image_missing"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UsoflowError) as caught:
        build(Request("a", subjects=(tmp_path / "broken.png",), keep_size=True))
    assert caught.value.code == "image_invalid"
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(UsoflowError) as caught:
        build(Request("a", subjects=(tmp_path / "huge.png",), keep_size=True))
    assert caught.value.code == "image_too_large"


PARTS = {
    "diffusion_models/flux1-dev.safetensors": "model.diffusion_model.",
    "text_encoders/clip_l.safetensors": "text_encoders.clip_l.transformer.",
    "text_encoders/t5xxl_fp16.safetensors": "text_encoders.t5xxl.transformer.",
    "vae/ae.safetensors": "vae.",
}


@pytest.fixture
def split_models(tmp_path: Path) -> Path:
    """The pocket models as the files that black-forest-labs and comfyanonymous publish."""
    root = tmp_path / "split"
    shutil.copytree(POCKET_MODELS, root)
    (checkpoint,) = (root / "checkpoints").iterdir()
    tensors, metadata = load_file(checkpoint), dict(TensorFile.open(checkpoint).metadata)
    for path, prefix in PARTS.items():
        (root / path).parent.mkdir(exist_ok=True)
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        save_file(own, root / path, metadata=metadata)
    checkpoint.unlink()
    return root


def test_split_files_take_the_checkpoints_place(split_models: Path, picture: Path, tmp_path: Path) -> None:
    """All four uses give the same pictures; the workflow in them opens as what was run."""
    others = {"steps": 1, "seed": 3, "size": (64, 64)}
    with (
        Engine(models=split_models, output=tmp_path / "a", device="cpu", dtype="fp32") as split,
        Engine(models=POCKET_MODELS, output=tmp_path / "b", device="cpu", dtype="fp32") as whole,
    ):
        for given in (
            {},
            {"subject": picture, "subject_size": 64},
            {"style": picture},
            {"subject": [picture] * 2, "style": picture, "subject_size": 64},
        ):
            found, wanted = (engine.generate("a fox", **given, **others) for engine in (split, whole))
            assert found.images[0].tobytes() == wanted.images[0].tobytes()
            again = Workflow.load(found.paths[0])
            assert again.prompt.to_json() == found.workflow.prompt.to_json()
            kinds = {node.class_type for node in again.prompt.nodes.values()}
            assert {"UNETLoader", "DualCLIPLoader", "VAELoader"} < kinds
            assert "CheckpointLoaderSimple" not in kinds
    assert any("flux1-dev.safetensors, clip_l.safetensors" in warning for warning in found.warnings)


def test_the_field_of_the_subgraphs_node_chooses_the_split_transformer(split_models: Path) -> None:
    files = at_hand(find_folders(models=split_models))
    workflow = build(Request("a fox"), files).set("113:72.unet_name", "other.safetensors")
    assert workflow.ui is not None
    (host,) = (node for node in workflow.ui["nodes"] if node["id"] == 113)
    assert "other.safetensors" in host["widgets_values"]


def test_a_checkpoint_in_parts_is_not_missing(split_models: Path) -> None:
    """Where a workflow asks for it, the parts are named."""
    folders = find_folders(models=split_models)
    assert CHECKPOINT not in missing(folders)
    advice = missing_file_remedy("checkpoints", CHECKPOINT.name, folders)
    assert "You have flux1-dev.safetensors, clip_l.safetensors" in advice
    assert "models pull" not in advice


def test_of_several_split_files_the_usual_ones_are_taken(split_models: Path) -> None:
    encoders, transformers = split_models / "text_encoders", split_models / "diffusion_models"
    shutil.copy(encoders / "t5xxl_fp16.safetensors", encoders / "another.safetensors")
    found = at_hand(find_folders(models=split_models)).split
    assert found is not None
    assert (found.transformer, found.t5) == ("flux1-dev.safetensors", "t5xxl_fp16.safetensors")
    usual = transformers / "flux1-dev.safetensors"
    tensors, metadata = load_file(usual), dict(TensorFile.open(usual).metadata)
    save_file({name: t.half() for name, t in tensors.items()}, transformers / "small.safetensors", metadata)
    save_file({name: t.float() for name, t in tensors.items()}, transformers / "large.safetensors", metadata)
    shutil.copy(transformers / "large.safetensors", transformers / "a-kontext.safetensors")
    wider = torch.zeros(tensors["img_in.weight"].shape[0], 384)  # as FLUX.1 Fill
    save_file(tensors | {"img_in.weight": wider}, transformers / "fill.safetensors", metadata)
    usual.unlink()
    files = at_hand(find_folders(models=split_models))
    assert files.split is not None
    assert files.split.transformer == "large.safetensors"
    assert "large.safetensors" in files.notes[0]


def test_a_quantised_transformer_has_a_loader_of_its_own() -> None:
    split = SplitFiles("flux1-dev-Q4_K.gguf", "clip_l.safetensors", "t5.gguf", "ae.safetensors")
    nodes = build(Request("a fox"), replace(TUTORIAL, split=split)).prompt.nodes
    (loader,) = (node for node in nodes.values() if node.class_type == "UnetLoaderGGUF")
    assert loader.inputs == {"unet_name": "flux1-dev-Q4_K.gguf"}


def test_the_checkpoint_comes_before_its_parts(split_models: Path) -> None:
    (checkpoint,) = (POCKET_MODELS / "checkpoints").iterdir()
    shutil.copy(checkpoint, split_models / "checkpoints" / TUTORIAL.names["checkpoints"])
    assert at_hand(find_folders(models=split_models)).split is None

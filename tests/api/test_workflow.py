"""The workflow of the Python library: changed copies, and what is saved."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import small
from forbidden import forbid
from usoflow import Engine, UsoflowError, Workflow
from usoflow.workflow.loading import template

TEMPLATE = "template:flux1_dev_uso_reference_image_gen"


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    (tmp_path / "prompt.json").write_text(json.dumps(small.subject()))
    return Workflow.load(tmp_path / "prompt.json")


def test_setting_gives_a_changed_copy(workflow: Workflow) -> None:
    changed = workflow.set("KSampler.steps", 9).assign("text.text=7 dogs").with_seed(5)
    assert changed.to_prompt()["sampler"]["inputs"]["steps"] == 9
    assert changed.to_prompt()["text"]["inputs"]["text"] == "7 dogs"
    assert changed.seeds == (5,)
    assert workflow.to_prompt()["sampler"]["inputs"]["steps"] == 2


def test_a_picture_from_anywhere(workflow: Workflow, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    changed = workflow.with_picture("picture", tmp_path / "mine.png")
    assert changed.to_prompt()["picture"]["inputs"]["image"] == "mine.png"
    assert changed.pictures == {"mine.png": tmp_path / "mine.png"}


def test_one_picture_for_several_nodes_has_one_name(tmp_path: Path) -> None:
    """Else the pictures that are made would name files that nobody has; another of its name has its own."""
    prompt = small.with_style(small.subject())
    prompt["more"] = {"class_type": "LoadImage", "inputs": {"image": "x.png"}}
    first, second, third = [key for key, node in prompt.items() if node["class_type"] == "LoadImage"]
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "mine.png", tmp_path / "other" / "mine.png"):
        Image.new("RGB", (8, 8)).save(path)
    workflow = Workflow.load(prompt).with_picture(first, tmp_path / "mine.png")
    workflow = workflow.with_picture(second, tmp_path / "other" / ".." / "mine.png")
    workflow = workflow.with_picture(third, tmp_path / "other" / "mine.png")
    names = [workflow.to_prompt()[key]["inputs"]["image"] for key in (first, second, third)]
    assert names == ["mine.png", "mine.png", "1_mine.png"]


@pytest.mark.parametrize(
    ("target", "code"),
    [("steps", "set_invalid"), ("KSampler.none", "set_invalid"), ("none.x", "set_invalid")],
)
def test_targets_that_are_not_there(workflow: Workflow, target: str, code: str) -> None:
    with pytest.raises(UsoflowError) as caught:
        workflow.set(target, 1)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("assignment", "key", "name", "value"),
    [
        ("sampler.seed=9", "sampler", "seed", 9),
        ("sampler.seed=abc", "sampler", "seed", "abc"),
        ('sampler.model=["lora", 0]', "sampler", "model", ["lora", 0]),
        ("sampler.sampler_name=heun", "sampler", "sampler_name", "heun"),
        ("text.text=9", "text", "text", "9"),
        ("text.text=a=b.c", "text", "text", "a=b.c"),
        ("text.text=", "text", "text", ""),
        ("v1.0 text.text=z", "text", "text", "z"),
        ("linked.text=true", "linked", "text", "true"),
        ("linked.text=1e3", "linked", "text", "1e3"),
        ('linked.text="quoted"', "linked", "text", '"quoted"'),
        ("linked loader.ckpt_name=1.50", "linked loader", "ckpt_name", "1.50"),
        ("linked cache.verbose=true", "linked cache", "verbose", True),
        ("unknown.word=9", "unknown", "word", "9"),
        ("unknown.number=9", "unknown", "number", 9),
    ],
)
def test_assigning_reads_a_word_as_the_input_takes_it(
    assignment: str, key: str, name: str, value: object
) -> None:
    """Also where another node gives the value so far."""
    prompt = small.subject() | {
        "words": {"class_type": "PrimitiveString", "inputs": {"value": "a"}},
        "linked": {"class_type": "CLIPTextEncode", "inputs": {"text": ["words", 0]}},
        "linked loader": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": ["words", 0]}},
        "linked cache": {"class_type": "EasyCache", "inputs": {"verbose": ["words", 0]}},
        "unknown": {"class_type": "Unknown", "inputs": {"word": "a", "number": 1}},
    }
    prompt["text"]["_meta"] = {"title": "v1.0 text"}
    assert Workflow.load(prompt).assign(assignment).to_prompt()[key]["inputs"][name] == value


@pytest.mark.parametrize("assignment", ["sampler.seed", "seed=5"])
def test_no_assignment(workflow: Workflow, assignment: str) -> None:
    with pytest.raises(UsoflowError, match=r"NODE\.INPUT=VALUE"):
        workflow.assign(assignment)


class TestSubgraphs:
    """The template's fields are those of a node that stands for a subgraph."""

    @pytest.mark.parametrize(
        ("field", "within"),
        [
            ("112.text", "112:6.text"),
            ("USO Character Reference.text", "112:6.text"),
            ("112.seed", "112:31.seed"),
            ("112:57.guidance", "112:57:35.guidance"),
        ],
    )
    def test_a_field_that_its_node_shows(self, field: str, within: str) -> None:
        template = Workflow.load(TEMPLATE)
        changed = template.assign(f"{field}=5")
        assert changed == template.assign(f"{within}=5")
        assert changed.ui is not None
        assert Workflow.load(changed.ui).to_prompt() == changed.to_prompt()
        assert changed.to_prompt() != template.to_prompt()
        assert template.set(field, 5).to_prompt() == template.set(within, 5).to_prompt()

    def test_a_field_of_a_subgraph_in_a_subgraph_and_of_two_nodes(self) -> None:
        """Both get the value, that within by way of the field that its own host shows."""
        text = {"name": "text", "type": "STRING", "widget": {"name": "text"}}
        encoder = {"type": "CLIPTextEncode", "inputs": [{**text, "link": 1}], "widgets_values": ["a"]}
        link = {"id": 1, "origin_id": -10, "origin_slot": 0, "target_slot": 0}
        port = {"id": "p", "name": "text", "type": "STRING"}
        outer = {
            "id": "outer", "name": "Outer", "inputs": [port], "outputs": [],
            "nodes": [{**encoder, "id": 1}, {"id": 2, "type": "inner", "inputs": [{**text, "link": 2}]}],
            "links": [{**link, "target_id": 1}, {**link, "id": 2, "target_id": 2}],
        }  # fmt: skip
        inner = {
            "id": "inner", "name": "Inner", "inputs": [port], "outputs": [],
            "nodes": [{**encoder, "id": 3}], "links": [{**link, "target_id": 3}],
        }  # fmt: skip
        workflow = Workflow.load(
            {
                "nodes": [{"id": 9, "type": "outer", "inputs": [text], "widgets_values": ["a"]}],
                "links": [],
                "definitions": {"subgraphs": [outer, inner]},
            }
        )
        changed = workflow.set("Outer.text", "b")
        texts = {key: node.inputs["text"] for key, node in changed.prompt.nodes.items()}
        assert texts == {"9:1": "b", "9:2:3": "b"}
        assert changed.ui is not None
        assert Workflow.load(changed.ui).to_prompt() == changed.to_prompt()

    def test_a_field_that_it_does_not_show(self) -> None:
        with pytest.raises(UsoflowError, match=r"node 112 \(USO Character Reference\).*only text, width"):
            Workflow.load(TEMPLATE).set("112.steps", 5)

    def test_it_is_listed_and_meant(self) -> None:
        with pytest.raises(UsoflowError, match=r"did you mean USO Character Reference.*, 112 \(USO Char"):
            Workflow.load(TEMPLATE).set("uso character reference.text", "a")


@pytest.mark.parametrize(
    "target",
    ["47.image", "LoadImage.image", "112:31.steps", "88.image", "112.text", "USO Character Reference.text"],
)
def test_nodes_that_are_bypassed_are_told(target: str) -> None:
    """The editor shows them, the prompt does not have them."""
    from usoflow.api.official import Request, build

    workflow = build(Request("a"))  # of the template, without subject and styles
    with pytest.raises(UsoflowError, match="bypassed or muted") as caught:
        workflow.set(target, 1)
    assert caught.value.code == "set_invalid"
    with pytest.raises(UsoflowError, match="bypassed or muted"):
        workflow.assign(f"{target}=1")


def test_a_type_that_active_nodes_have_is_not_bypassed(tmp_path: Path) -> None:
    """Where two of three are active, the name stands for two."""
    from usoflow.api.official import Request, build

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    styles = (tmp_path / "a.png",) * 2
    workflow = build(Request("a", styles=styles))
    assert sum(node.class_type == "LoadImage" for node in workflow.prompt.nodes.values()) == 2
    with pytest.raises(UsoflowError, match="2 nodes are called LoadImage"):
        workflow.set("LoadImage.image", "x")


@pytest.mark.parametrize("name", ["ksampler", " KSampler", "samplr", "K-Sampler"])
def test_a_name_that_is_nearly_one(workflow: Workflow, name: str) -> None:
    with pytest.raises(UsoflowError, match=r"did you mean K?[Ss]ampler"):
        workflow.set(f"{name}.steps", 1)


def test_json_in_memory_is_a_workflow(workflow: Workflow) -> None:
    assert Workflow.load(workflow.to_prompt()).to_prompt() == workflow.to_prompt()


def test_json_in_memory_may_change_afterwards() -> None:
    given = template(TEMPLATE.removeprefix("template:"))
    loaded = Workflow.load(given)
    before = copy.deepcopy(loaded.ui)
    given["nodes"].clear()
    assert loaded.ui == before


def test_the_bytes_of_a_file_are_a_workflow(workflow: Workflow) -> None:
    assert Workflow.load(json.dumps(workflow.to_prompt()).encode()).prompt == workflow.prompt


def test_not_a_number_is_no_value_in_memory_as_in_a_file(tmp_path: Path) -> None:
    prompt = {"1": {"class_type": "ImageScaleBy", "inputs": {"scale_by": float("nan")}}}
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(prompt))
    assert Workflow.load(prompt).prompt == Workflow.load(file).prompt


@pytest.mark.parametrize("value", [None, [], 7, {"a": object()}, {"a": b"x"}])
def test_what_is_no_workflow(value: Any) -> None:
    with pytest.raises(UsoflowError) as caught:
        Workflow.load(value)
    assert caught.value.code == "not_a_workflow"


def test_saving_keeps_the_ui_graph(tmp_path: Path) -> None:
    workflow = Workflow.load(TEMPLATE)
    workflow.save(tmp_path / "same.json")
    assert json.loads((tmp_path / "same.json").read_text()) == workflow.ui
    changed = workflow.set("KSampler.steps", 9).with_seed(3)
    changed.save(tmp_path / "changed.json")
    assert "nodes" in json.loads((tmp_path / "changed.json").read_text())
    assert Workflow.load(tmp_path / "changed.json").to_prompt() == changed.to_prompt()


def test_without_a_field_for_a_change_there_is_no_ui_graph(tmp_path: Path) -> None:
    changed = Workflow.load(TEMPLATE).set("KSampler.model", ["112:30", 0])
    assert changed.ui is None
    assert any("112:31.model" in warning for warning in changed.warnings)
    changed.save(tmp_path / "changed.json")
    assert Workflow.load(tmp_path / "changed.json").to_prompt() == changed.to_prompt()


def test_names_that_begin_as_a_home_does(
    workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are names like others where nobody is called so."""
    monkeypatch.chdir(tmp_path)
    workflow.save("~nobody-of-this-name.json")
    assert Workflow.load("~nobody-of-this-name.json").to_prompt() == workflow.to_prompt()
    with pytest.raises(UsoflowError) as caught:
        workflow.with_picture("picture", "~nobody-of-this-name/a.png")
    assert caught.value.code == "image_missing"


@pytest.mark.parametrize("name", ["x" * 300, "none/a.png", "."])
def test_a_picture_that_is_not_there(workflow: Workflow, name: str) -> None:
    with pytest.raises(UsoflowError) as caught:
        workflow.with_picture("picture", name)
    assert (caught.value.code, caught.value.remedy) == ("image_missing", "Check the path.")


def test_a_picture_in_a_folder_that_may_not_be_searched(
    workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    forbid(monkeypatch, tmp_path / "secret")
    with pytest.raises(UsoflowError, match="cannot be read"):
        workflow.with_picture("picture", tmp_path / "secret" / "a.png")


def test_the_name_of_a_picture_means_no_other_folder(workflow: Workflow, tmp_path: Path) -> None:
    """An ending that ComfyUI reads as a folder's is left out of the name in the prompt."""
    Image.new("RGB", (8, 8)).save(tmp_path / "robot [output]", "PNG")
    changed = workflow.with_picture("picture", tmp_path / "robot [output]")
    assert changed.to_prompt()["picture"]["inputs"]["image"] == "robot"
    assert changed.pictures == {"robot": tmp_path / "robot [output]"}


def test_a_folder_that_is_not_there(workflow: Workflow, tmp_path: Path) -> None:
    with pytest.raises(UsoflowError) as caught:
        workflow.save(tmp_path / "none" / "saved.json")
    assert caught.value.code == "output_unwritable"


def test_a_seed_from_a_primitive(tmp_path: Path) -> None:
    prompt = small.text_to_image()
    prompt["number"] = {"class_type": "PrimitiveInt", "inputs": {"value": 4}}
    prompt["sampler"]["inputs"]["seed"] = ["number", 0]
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    workflow = Workflow.load(tmp_path / "prompt.json")
    assert workflow.seeds == (4,)
    changed = workflow.with_seed(7)
    assert changed.to_prompt()["number"]["inputs"]["value"] == 7
    assert changed.seeds == (7,)


def test_a_seed_that_cannot_be_set_is_an_error(tmp_path: Path) -> None:
    prompt = small.text_to_image()
    prompt["sampler"]["inputs"]["seed"] = ["else", 0]
    prompt["else"] = {"class_type": "Other", "inputs": {}}
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    with pytest.raises(UsoflowError) as caught:
        Workflow.load(tmp_path / "prompt.json").with_seed(7)
    assert caught.value.code == "set_invalid"


def test_a_seed_that_stays_is_told() -> None:
    prompt = small.text_to_image()
    prompt["other"] = {"class_type": "KSampler", "inputs": {"seed": ["else", 0]}}
    prompt["else"] = {"class_type": "Other", "inputs": {}}
    changed = Workflow.load(prompt).with_seed(7)
    assert changed.seeds == (7,)
    assert ["other.seed" in warning for warning in changed.warnings] == [True]


def test_a_seed_from_a_node_that_has_a_seed_changes_with_it() -> None:
    prompt = small.with_inputs(small.text_to_image(), "sampler", seed=["seed", 0])
    prompt["seed"] = {"class_type": "Seed", "inputs": {"seed": 1}}
    changed = Workflow.load(prompt).with_seed(7)
    assert changed.to_prompt()["seed"]["inputs"]["seed"] == 7
    assert changed.warnings == ()


def test_without_any_seed_there_is_none_to_set() -> None:
    prompt = {key: node for key, node in small.text_to_image().items() if key != "sampler"}
    with pytest.raises(UsoflowError, match="no seed to set") as caught:
        Workflow.load(prompt).with_seed(7)
    assert caught.value.code == "set_invalid"
    assert "Leave out" in caught.value.remedy


def test_a_seed_in_quotes_is_a_seed() -> None:
    prompt = small.with_inputs(small.text_to_image(), "sampler", seed="5")
    assert Workflow.load(prompt).with_seed(7).seeds == (7,)


def test_an_optional_input_that_the_prompt_leaves_out(tmp_path: Path) -> None:
    prompt = {
        "1": {
            "class_type": "DualCLIPLoader",
            "inputs": {"clip_name1": "a", "clip_name2": "b", "type": "flux"},
        }
    }
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    workflow = Workflow.load(tmp_path / "prompt.json")
    assert workflow.assign("1.device=cpu").to_prompt()["1"]["inputs"]["device"] == "cpu"
    with pytest.raises(UsoflowError) as caught:
        workflow.assign("1.devise=cpu")
    assert "device" in caught.value.detail


def test_it_goes_from_one_process_to_another(workflow: Workflow) -> None:
    loaded = Engine().load(workflow.prompt.to_json())
    assert pickle.loads(pickle.dumps(loaded)) == loaded

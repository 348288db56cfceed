"""The workflow of the Python library: changed copies, and what is saved."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

import small
from usoflow import Engine, UsoflowError, Workflow

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


@pytest.mark.parametrize(
    ("target", "code"),
    [("steps", "set_invalid"), ("KSampler.none", "set_invalid"), ("none.x", "set_invalid")],
)
def test_targets_that_are_not_there(workflow: Workflow, target: str, code: str) -> None:
    with pytest.raises(UsoflowError) as caught:
        workflow.set(target, 1)
    assert caught.value.code == code


@pytest.mark.parametrize("target", ["47.image", "LoadImage.image", "112:31.steps", "88.image"])
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

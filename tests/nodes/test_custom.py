"""V1 classes from a folder: their schemas, what they compute, what is said of those that cannot be used."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from forbidden import forbid
from usoflow.api.workflow import Workflow
from usoflow.errors import UsoflowError
from usoflow.execution.executor import Executor, RunResult
from usoflow.execution.order import NodeError
from usoflow.execution.progress import Event, NodesCached
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.nodes import registry
from usoflow.nodes.custom_folder import load, with_custom
from usoflow.schema.node import NodeRegistry
from usoflow.schema.object_info import render
from usoflow.schema.validation import validate
from usoflow.schema.wire import from_json, to_json
from usoflow.settings import find_folders
from usoflow.workflow.loading import load_json
from usoflow.workflow.prompt import Prompt

EXAMPLES = Path(__file__).parents[1] / "custom_nodes"
HEAD = """
class Plain:
    CATEGORY, RETURN_TYPES, FUNCTION = "test", ("INT",), "run"
    @classmethod
    def INPUT_TYPES(s): return {"required": {"a": ("INT", {"default": 1})}}
    def run(self, a): return (a,)
"""


def taking(types: str) -> str:
    """Source of a class with these INPUT_TYPES."""
    lines = ["class X(Plain):", "    @classmethod", f"    def INPUT_TYPES(s): return {types}"]
    return "\n".join([*lines, "NODE_CLASS_MAPPINGS = {'X': X}"])


def giving(types: str, values: str) -> str:
    """Source of a class X without inputs that gives these values."""
    lines = [f"class X(Plain):\n    RETURN_TYPES = {types}", f"    def run(self): return {values}"]
    inputs = "    @classmethod\n    def INPUT_TYPES(s): return {'required': {}}"
    return "\n".join(["import torch", HEAD, *lines, inputs, "NODE_CLASS_MAPPINGS = {'X': X}"])


@pytest.fixture
def nodes() -> NodeRegistry:
    """Ours and the examples."""
    return with_custom(registry(), EXAMPLES)


class Runs:
    """Runs prompts one after another."""

    def __init__(self, nodes: NodeRegistry, root: Path) -> None:
        self.executor = Executor(nodes, ModelLibrary(Placement.choose("cpu", "fp32")))
        self.folders = find_folders(output=root)

    def __call__(self, prompt: dict[str, Any], *targets: str) -> RunResult:
        checked = validate(prompt, self.executor.registry, self.folders, targets=targets)
        assert checked.error is None, checked
        return self.executor.run(Prompt.parse(checked.prompt), targets, self.folders)


@pytest.fixture
def run(nodes: NodeRegistry, tmp_path: Path) -> Runs:
    """An executor over ours and the examples."""
    return Runs(nodes, tmp_path / "output")


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt."""
    return {"class_type": class_type, "inputs": inputs}


def test_the_editor_is_told_what_the_class_says(nodes: NodeRegistry) -> None:
    info = render(nodes["Brightness"].schema, find_folders())
    assert info["display_name"] == "Brightness (example)"
    assert info["python_module"] == "custom_nodes.brightness"
    assert (info["output"], info["output_name"]) == (["IMAGE", "FLOAT"], ["image", "mean"])
    required = info["input"]["required"]
    assert required["image"] == ["IMAGE", {}]
    assert required["factor"][1]["display"] == "slider"
    assert required["mode"] == [["multiply", "invert"], {"default": "multiply", "tooltip": "What is done."}]
    assert list(info["input"]["optional"]) == ["count"]
    assert info["input"]["hidden"] == {"node": "UNIQUE_ID", "prompt": "PROMPT"}
    assert render(nodes["ShowNumber"].schema, find_folders())["output_node"] is True


def test_schemas_survive_the_pipe(nodes: NodeRegistry) -> None:
    for entry in nodes.values():
        record = json.loads(json.dumps(to_json(entry.schema)))
        again = from_json(record)
        assert again.inputs == entry.schema.inputs
        assert render(again, find_folders()) == render(entry.schema, find_folders())


def test_outputs_ui_and_files(run: Runs) -> None:
    prompt = {
        "grey": node("EmptyImage", width=8, height=8, batch_size=1, color=0x404040),
        "bright": node("Brightness", image=["grey", 0], factor=1.5, mode="multiply", count=2),
        "show": node("ShowNumber", value=["bright", 1]),
        "save": node("SaveImage", images=["bright", 0], filename_prefix="x"),
    }
    result = run(prompt, "show", "save")
    assert result.shown["show"].record() == {"text": [f"{0x40 / 255 * 2.25:.3f}"]}
    assert result.shown["save"].images[0].filename == "x_00001_.png"


def test_an_output_node_gives_its_outputs_on(run: Runs) -> None:
    prompt = {
        "grey": node("EmptyImage", width=8, height=8, batch_size=1, color=0x404040),
        "first": node("Brightness", image=["grey", 0], factor=1.0, mode="invert"),
        "show": node("ShowNumber", value=["first", 1]),
        "again": node("ShowNumber", value=["show", 0]),
    }
    assert run(prompt, "again").shown["again"].other == {"text": [f"{1 - 0x40 / 255:.3f}"]}
    events: list[Event] = []
    run.executor.run(Prompt.parse(prompt), ["again"], run.folders, listen=events.append)
    (told,) = events
    assert isinstance(told, NodesCached)
    assert told.node_ids == ("grey", "first", "show", "again")
    assert list(told.shown) == ["show", "again"]


@pytest.mark.parametrize("given", ["()", "None", "{}", "{'result': ()}", "{'ui': {}}"])
def test_an_output_node_may_show_nothing(tmp_path: Path, given: str) -> None:
    source = f"""
class Silent(Plain):
    RETURN_TYPES, OUTPUT_NODE = (), True
    def run(self, a): return {given}
NODE_CLASS_MAPPINGS = {{"Silent": Silent}}
"""
    (tmp_path / "x.py").write_text(HEAD + source, encoding="utf-8")
    result = Runs(with_custom(registry(), tmp_path), tmp_path / "output")({"7": node("Silent", a=1)}, "7")
    assert result.shown == {}
    assert [record.shown for record in result.finished] == [None]


@pytest.mark.parametrize(("fixed", "second"), [(False, "2.000"), (True, "1.000")])
def test_is_changed_decides_whether_it_runs_again(run: Runs, fixed: bool, second: str) -> None:
    prompt = {"count": node("Counter", fixed=fixed), "show": node("ShowNumber", value=["count", 0])}
    assert run(prompt, "show").shown["show"].other == {"text": ["1.000"]}
    assert run(prompt, "show").shown["show"].other == {"text": [second]}


def test_validate_inputs_decides_about_the_inputs_that_it_names(run: Runs) -> None:
    def prompt(size: int) -> dict[str, Any]:
        grey = node("Grey", size=size, level=0.5)
        return {"grey": grey, "preview": node("PreviewImage", images=["grey", 0])}

    assert run(prompt(16), "preview").shown["preview"].images  # not in the list, but it says yes
    with pytest.raises(NodeError, match="the size 17 is odd") as caught:
        run(prompt(17), "preview")
    assert (caught.value.code, caught.value.node_id) == ("values_refused", "grey")


def with_another_output(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A prompt of two outputs, of which `never` needs this node and `preview` does not."""
    return {
        name: given,
        "never": node("PreviewImage", images=[name, 0]),
        "empty": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "preview": node("PreviewImage", images=["empty", 0]),
    }


def test_what_needs_no_node_that_refuses_is_run(run: Runs, caplog: pytest.LogCaptureFixture) -> None:
    done = run(with_another_output("grey", node("Grey", size=17, level=0.5)), "never", "preview")
    assert done.shown.keys() == {"preview"}
    assert done.warnings == ("left out, with what needs it: Grey (node grey): the size 17 is odd",)
    assert done.warnings[0] in caplog.text


@pytest.mark.parametrize(
    ("type_", "given", "consumer", "words"),
    [
        ("IMAGE", "None", "PreviewImage", "output 0 is None"),
        (
            "IMAGE",
            "torch.zeros(8, 8, 3)",
            "PreviewImage",
            r"a tensor \[8, 8, 3\] instead of a tensor \[B, H, W, C\]",
        ),
        ("IMAGE", "[torch.zeros(1, 8, 8, 3)]", "PreviewImage", "of type list instead"),
        ("IMAGE", "torch.full((1, 8, 8, 3), float('nan'))", "PreviewImage", "not finite"),
        ("LATENT", "torch.zeros(1, 16, 8, 8)", "LatentUpscaleBy", "instead of {"),
        ("MASK", "0.5", "MaskToImage", "of type float instead"),
    ],
)
def test_what_is_not_as_it_promises_is_its_authors(
    tmp_path: Path, type_: str, given: str, consumer: str, words: str
) -> None:
    (tmp_path / "x.py").write_text(giving(f"({type_!r},)", f"({given},)"))
    run = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    name = {"PreviewImage": "images", "LatentUpscaleBy": "samples", "MaskToImage": "mask"}[consumer]
    prompt = {"x": node("X"), "use": node(consumer, **{name: ["x", 0]})}
    if consumer == "LatentUpscaleBy":
        prompt["use"]["inputs"] |= {"upscale_method": "bilinear", "scale_by": 2.0}
    with pytest.raises(NodeError, match=words) as caught:
        run.executor.run(Prompt.parse(prompt), ["use"], run.folders)
    assert (caught.value.code, caught.value.node_id) == ("custom_node_failed", "x")


def test_what_may_be_left_out_may_be_none(tmp_path: Path) -> None:
    """As switches of custom nodes give it."""
    source = giving('("CONDITIONING", "LATENT")', "([(torch.zeros(1, 4, 8), {})], None)")
    (tmp_path / "gives.py").write_text(source)
    run = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    prompt = {"x": node("X"), "use": node("ReferenceLatent", conditioning=["x", 0], latent=["x", 1])}
    run.executor.run(Prompt.parse(prompt), ["use"], run.folders)


def test_a_check_that_fails_stops_what_needs_its_node_alone(tmp_path: Path) -> None:
    source = """
class Fails:
    CATEGORY, RETURN_TYPES, FUNCTION = "test", ("IMAGE",), "run"
    @classmethod
    def INPUT_TYPES(s): return {"required": {}}
    @classmethod
    def VALIDATE_INPUTS(s): raise ValueError("not yet")
    def run(self): return (None,)
NODE_CLASS_MAPPINGS = {"Fails": Fails}
"""
    (tmp_path / "fails.py").write_text(source)
    run = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    prompt = with_another_output("fails", node("Fails"))
    assert run(prompt, "never", "preview").shown.keys() == {"preview"}
    with pytest.raises(NodeError, match="not yet") as caught:
        run(prompt, "never")
    assert caught.value.code == "custom_node_failed"


def test_types_of_its_own_hold_what_they_like(tmp_path: Path) -> None:
    values = '(torch.full((4,), float("-inf")), torch.zeros(1, 8, 8, 3))'
    (tmp_path / "gives.py").write_text(giving('("BIAS", "IMAGE")', values))
    run = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    assert run({"x": node("X"), "use": node("PreviewImage", images=["x", 1])}, "use").shown["use"].images


def test_ranges_and_options_are_checked_before_it_runs(nodes: NodeRegistry) -> None:
    prompt = {
        "grey": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "bright": node("Brightness", image=["grey", 0], factor=9.0, mode="other"),
        "preview": node("PreviewImage", images=["bright", 0]),
    }
    errors = validate(prompt, nodes, find_folders()).node_errors["bright"]["errors"]
    assert {error["type"] for error in errors} == {"value_bigger_than_max", "value_not_in_list"}


@pytest.mark.parametrize(("class_type", "error"), [("Raises", "ValueError"), ("Exits", "SystemExit")])
def test_an_exception_is_its_authors(run: Runs, class_type: str, error: str) -> None:
    prompt = {"bad": node(class_type), "preview": node("PreviewImage", images=["bad", 0])}
    with pytest.raises(NodeError, match=f"{error}: what the author says") as caught:
        run(prompt, "preview")
    assert (caught.value.code, caught.value.node_id) == ("custom_node_failed", "bad")
    assert "--custom-nodes" in caught.value.remedy


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_library.part", "'no_such_library', which is not installed: see its requirements"),
        ("import node_helpers", "ComfyUI's own module 'node_helpers'"),
        ("from comfy_execution.graph import ExecutionBlocker", "ComfyUI's own module 'comfy_execution"),
        ("from folder_paths import get_output_directory", "ComfyUI's own module 'folder_paths'"),
        ("def (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("x = 1", "NODE_CLASS_MAPPINGS"),
        (HEAD + "NODE_CLASS_MAPPINGS = {'KSampler': Plain}", "there is a node of this name already"),
        (HEAD + "NODE_CLASS_MAPPINGS = {'Good': Plain}", "there is a node of this name already"),
        ("NODE_CLASS_MAPPINGS = {'X': int}", "cannot be read"),
        (HEAD + "class X(Plain): FUNCTION = 'none'\nNODE_CLASS_MAPPINGS = {'X': X}", "names no method"),
        (
            HEAD + "class X(Plain):\n    async def run(self): pass\nNODE_CLASS_MAPPINGS = {'X': X}",
            "FUNCTION is async",
        ),
        (HEAD + "class X(Plain): INPUT_IS_LIST = True\nNODE_CLASS_MAPPINGS = {'X': X}", "lists"),
        (
            HEAD + taking("{'optional': type('D', (dict,), {'__contains__': lambda *_: True})()}"),
            "of any name",
        ),
        (HEAD + taking("{'required': {'context': ('STRING', {})}}"), "called context"),
        (HEAD + taking("{'required': {'a': ('INT', {'lazy': True})}}"), "lazy or rawLink: a"),
        (HEAD + taking("{'optional': {'b': ('INT', {'rawLink': True})}}"), "lazy or rawLink: b"),
        (HEAD + taking("{'required': {'a': ('STRING', {'default': object()})}}"), "not JSON serializable"),
        ("import usoflow_custom_nodes.broken.absent", "one of its own files is missing: broken.absent"),
        (
            HEAD + "class X(Plain): INPUT_TYPES = lambda: exit(3)\nNODE_CLASS_MAPPINGS = {'X': X}",
            "SystemExit: 3",
        ),
        ("NODE_CLASS_MAPPINGS = type('D', (dict,), {'items': lambda _: 1 / 0})()", "ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_named_and_stops_no_other(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "a_good.py").write_text(HEAD + "NODE_CLASS_MAPPINGS = {'Good': Plain}", encoding="utf-8")
    (tmp_path / "broken.py").write_text(source, encoding="utf-8")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("from .inner import NODE_CLASS_MAPPINGS", "utf-8")
    (tmp_path / "package" / "inner.py").write_text(HEAD + "NODE_CLASS_MAPPINGS = {'Two': Plain}", "utf-8")
    (tmp_path / "off.py.disabled").write_text("1 / 0", encoding="utf-8")
    (tmp_path / "__pycache__").mkdir(exist_ok=True)
    found = load(tmp_path, registry())
    assert [entry.schema.class_type for entry in found.nodes] == ["Good", "Two"]
    (problem,) = found.problems
    assert problem.startswith("broken.py: ")
    assert words in problem


@pytest.mark.parametrize("names", ["None", "['Good']", "'Good'"])
def test_names_that_are_none_leave_the_node_its_own(tmp_path: Path, names: str) -> None:
    lines = ["NODE_CLASS_MAPPINGS = {'Good': Plain}", f"NODE_DISPLAY_NAME_MAPPINGS = {names}"]
    (tmp_path / "x.py").write_text(HEAD + "\n".join(lines), encoding="utf-8")
    found = load(tmp_path, registry())
    assert not found.problems
    assert render(found.nodes[0].schema, find_folders())["display_name"] == "Good"


def test_a_limit_that_is_no_number_is_none(tmp_path: Path) -> None:
    """Infinity, which JSON does not have either; a text; a truth."""
    types = """{"required": {"a": ("FLOAT", {"default": 1.0, "min": float("-inf"), "max": float("inf")}),
                             "b": ("INT", {"min": "0", "max": True, "step": 2})}}"""
    (tmp_path / "x.py").write_text(HEAD + taking(types), encoding="utf-8")
    nodes = with_custom(registry(), tmp_path)
    record = render(nodes["X"].schema, find_folders())["input"]["required"]
    assert json.loads(json.dumps(record, allow_nan=False))["a"][1]["max"] is None
    prompt = {"x": node("X", a="-1e300", b="9"), "show": node("PreviewAny", source=["x", 0])}
    good = validate(prompt, nodes, find_folders())
    assert good.prompt["x"]["inputs"] == {"a": -1e300, "b": 9}
    prompt["x"]["inputs"]["a"] = "much"
    errors = validate(prompt, nodes, find_folders()).node_errors["x"]["errors"]
    assert "'much'" in json.dumps(errors, allow_nan=False)


def test_outputs_that_were_promised_must_come(tmp_path: Path) -> None:
    text = HEAD + "class X(Plain):\n    def run(self, a): return ()\nNODE_CLASS_MAPPINGS = {'X': X}"
    (tmp_path / "x.py").write_text(text, encoding="utf-8")
    run = Runs(with_custom(registry(), tmp_path), tmp_path)
    prompt = {
        "x": node("X", a=1),
        "image": node("EmptyImage", width=["x", 0], height=8, batch_size=1, color=0),
        "out": node("PreviewImage", images=["image", 0]),
    }
    with pytest.raises(NodeError, match="RETURN_TYPES promises 1 outputs, the function gave 0"):
        run(prompt, "out")


@pytest.mark.parametrize("name", ["none", "~nobody-of-this-name/nodes"])
def test_a_folder_that_is_not_there(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsoflowError, match=name) as caught:
        with_custom(registry(), Path(name))
    assert caught.value.code == "file_not_found"


def test_a_folder_that_may_not_be_looked_into_holds_no_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lost+found, and packages of another user."""
    (tmp_path / "good.py").write_text(HEAD + "NODE_CLASS_MAPPINGS = {'Good': Plain}", encoding="utf-8")
    (tmp_path / "lost+found").mkdir()
    forbid(monkeypatch, tmp_path / "lost+found")
    found = load(tmp_path, registry())
    assert [entry.schema.class_type for entry in found.nodes] == ["Good"]
    assert not found.problems


CHANGES_IN_PLACE = """
class Halves(Plain):
    RETURN_TYPES = ("IMAGE", "LATENT")
    @classmethod
    def INPUT_TYPES(s): return {"required": {"image": ("IMAGE",), "latent": ("LATENT",)}}
    def run(self, image, latent):
        latent["seen"] = True
        return (image.mul_(0.5), {"samples": latent["samples"].add_(1.0)})
NODE_CLASS_MAPPINGS = {"Halves": Halves}
"""


def test_what_a_node_changes_in_place_stays_as_it_was_for_others(tmp_path: Path) -> None:
    """Also in later runs, which take it from the cache."""
    (tmp_path / "x.py").write_text(HEAD + CHANGES_IN_PLACE, encoding="utf-8")
    run = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    prompt = {
        "white": node("EmptyImage", width=8, height=8, batch_size=1, color=0xFFFFFF),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "half": node("Halves", image=["white", 0], latent=["empty", 0]),
        "save": node("SaveImage", images=["white", 0], filename_prefix="white"),
        "half save": node("SaveImage", images=["half", 0], filename_prefix="half"),
        "latent": node("PreviewAny", source=["empty", 0]),
    }
    for targets in (("half save",), ("half save", "save", "latent")):
        shown = run(prompt, *targets).shown
    for name, level in (("white", 255), ("half", 127)):
        with Image.open(tmp_path / "output" / f"{name}_00001_.png") as picture:
            assert picture.getpixel((0, 0)) == (level,) * 3
    assert "seen" not in shown["latent"].other["text"][0]
    assert "1." not in shown["latent"].other["text"][0]


def test_an_instance_is_kept_as_long_as_the_prompt_has_its_node(run: Runs) -> None:
    prompt = {"count": node("Counter", fixed=False), "show": node("ShowNumber", value=["count", 0])}
    other = {"number": node("PrimitiveFloat", value=7.0), "show": node("ShowNumber", value=["number", 0])}

    def counted() -> str:
        return str(run(prompt, "show").shown["show"].other["text"][0])

    assert [counted(), counted()] == ["1.000", "2.000"]
    run(prompt | {"other": node("ShowNumber", value=["number", 0]), "number": other["number"]}, "other")
    assert counted() == "3.000"
    run(other, "show")
    assert counted() == "1.000"
    run.executor.clear()
    assert counted() == "1.000"


FIELDS = """
class Fields:
    CATEGORY, RETURN_TYPES, FUNCTION = "test", ("STRING",), "run"
    @classmethod
    def INPUT_TYPES(s): return {"required": {
        "mode": (["a", "b"], {"control_after_generate": True}),
        "text": ("STRING", {"dynamicPrompts": True}), "k": ("INT", {"default": 1})},
        "optional": {"more": ("INT", {"default": 0})}}
    def run(self, mode, text, k, more=0): return (text,)
NODE_CLASS_MAPPINGS = {"Fields": Fields}
"""


def test_the_editors_own_fields_of_a_custom_node(tmp_path: Path) -> None:
    """A control beside a list; alternatives in a text; values that are set show in the graph."""
    (tmp_path / "fields.py").write_text(FIELDS)
    nodes = with_custom(registry(), tmp_path)
    fields = {
        "id": 1,
        "type": "Fields",
        "mode": 0,
        "inputs": [],
        "outputs": [{"name": "STRING", "type": "STRING"}],
    }
    fields["widgets_values"] = ["a", "fixed", "{x|y}", 3, 4]
    graph = {"nodes": [fields], "links": [], "version": 0.4}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    workflow = Workflow.load(tmp_path / "graph.json", nodes=nodes)
    assert workflow.prompt.nodes["1"].inputs == {"mode": "a", "text": "x", "k": 3, "more": 4}
    changed = workflow.set("Fields.k", 5)
    assert changed.prompt.nodes["1"].inputs["k"] == 5
    assert changed.ui is not None
    assert changed.ui["nodes"][0]["widgets_values"] == ["a", "fixed", "{x|y}", 5, 4]


def test_the_filter_beside_the_control_of_a_list(tmp_path: Path) -> None:
    """Newer editors store it; what follows keeps its place."""
    (tmp_path / "fields.py").write_text(FIELDS)
    fields = {"id": 1, "type": "Fields", "mode": 0, "widgets_values": ["b", "fixed", "", "x", 3, 4]}
    loaded = load_json({"nodes": [fields], "links": []}, with_custom(registry(), tmp_path))
    assert loaded.prompt.nodes["1"].inputs == {"mode": "b", "text": "x", "k": 3, "more": 4}


def test_an_input_without_a_field_takes_no_value_of_the_editors(tmp_path: Path) -> None:
    types = """{"required": {"text": ("STRING", {"forceInput": True}), "a": ("FLOAT", {"default": 1.0}),
                             "file": (["x", "y"], {"image_upload": True})},
                "optional": {"b": ("INT", {"default": 3})}}"""
    (tmp_path / "x.py").write_text(HEAD + taking(types), encoding="utf-8")
    nodes = with_custom(registry(), tmp_path)
    shown = {"id": 1, "type": "X", "mode": 0, "inputs": [], "widgets_values": [2.5, "y", "image", 7]}
    data = {"nodes": [shown], "links": [], "version": 0.4}
    assert load_json(data, nodes).prompt.to_json()["1"]["inputs"] == {"a": 2.5, "file": "y", "b": 7}


def test_nodes_that_know_their_id_share_no_output(tmp_path: Path) -> None:
    source = """
class Own(Plain):
    @classmethod
    def INPUT_TYPES(s): return {"hidden": {"id": "UNIQUE_ID"}}
    RETURN_TYPES = ("FLOAT",)
    def run(self, id): return (float(id),)
NODE_CLASS_MAPPINGS = {"Own": Own}
"""
    (tmp_path / "x.py").write_text(HEAD + source, encoding="utf-8")
    run = Runs(with_custom(with_custom(registry(), EXAMPLES), tmp_path), tmp_path / "output")
    prompt = {"1": node("Own"), "2": node("Own")}
    prompt |= {f"show{key}": node("ShowNumber", value=[key, 0]) for key in ("1", "2")}
    for _ in range(2):
        shown = run(prompt, "show1", "show2").shown
        assert [shown[f"show{key}"].other for key in ("1", "2")] == [{"text": ["1.000"]}, {"text": ["2.000"]}]


def test_what_no_json_can_say_is_shown_as_null(tmp_path: Path) -> None:
    source = """class Shows:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "show", True
    INPUT_TYPES = classmethod(lambda s: {"required": {}})
    def show(self): return {"ui": {"value": [float("nan"), float("-inf"), 1.0]}}
NODE_CLASS_MAPPINGS = {"Shows": Shows}
"""
    (tmp_path / "shows.py").write_text(source)
    runs = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    assert runs({"1": node("Shows")}, "1").shown["1"].record() == {"value": [None, None, 1.0]}


@pytest.mark.parametrize(("line", "ran"), [("", 1), ("    NOT_IDEMPOTENT = True", 2)])
def test_equal_nodes_run_once_unless_they_say_otherwise(tmp_path: Path, line: str, ran: int) -> None:
    source = f"""
class Sum(Plain):
{line}
    RETURN_TYPES = ("FLOAT",)
    def run(self, a): return (float(a),)
NODE_CLASS_MAPPINGS = {{"Sum": Sum}}
"""
    (tmp_path / "x.py").write_text(HEAD + source, encoding="utf-8")
    run = Runs(with_custom(with_custom(registry(), EXAMPLES), tmp_path), tmp_path / "output")
    prompt = {key: node("Sum", a=3) for key in ("1", "2")}
    prompt |= {f"show{key}": node("ShowNumber", value=[key, 0]) for key in ("1", "2")}
    result = run(prompt, "show1", "show2")
    assert [record.class_type for record in result.finished].count("Sum") == ran
    assert result.shown["show1"] == result.shown["show2"]


ASKED = """
class Asked(Plain):
    RETURN_TYPES, OUTPUT_NODE = ("FLOAT",), True
    @classmethod
    def INPUT_TYPES(s): return {
        "required": {"a": ("INT", {}), "b": ("INT", {})}, "hidden": {"me": "UNIQUE_ID", "all": "PROMPT"}}
    @classmethod
    def IS_CHANGED(s, a, me): return f"{a} {me}"
    @classmethod
    def VALIDATE_INPUTS(s, me, all): return all[me]["inputs"]["b"] == 2 or f"{me} wants 2"
    def run(self, a, b, me, all): return (float(a),)
NODE_CLASS_MAPPINGS = {"Asked": Asked}
"""


def test_is_changed_and_validate_inputs_get_the_hidden_inputs_that_they_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.py").write_text(HEAD + ASKED, encoding="utf-8")
    run = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    assert len(run({"7": node("Asked", a=1, b=2)}, "7").finished) == 1
    assert len(run({"7": node("Asked", a=1, b=2)}, "7").finished) == 0
    assert not caplog.messages
    with pytest.raises(NodeError, match="7 wants 2"):
        run({"7": node("Asked", a=1, b=3)}, "7")


ANY_NAME = """
class Name(Plain):
    RETURN_TYPES = ("*",)
    def run(self, a): return (f"{a}.png",)
NODE_CLASS_MAPPINGS = {"Name": Name}
"""


def test_a_file_that_a_link_names_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(HEAD + ANY_NAME, encoding="utf-8")
    run = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    run.folders = find_folders(inputs=tmp_path, output=tmp_path / "output")
    prompt = {
        "name": node("Name", a=1),
        "load": node("LoadImage", image=["name", 0]),
        "save": node("SaveImage", images=["load", 0], filename_prefix="x"),
    }
    for number, colour in enumerate(("red", "lime"), start=1):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "1.png")
        run(prompt, "save")
        with Image.open(tmp_path / "output" / f"x_0000{number}_.png") as saved:
            assert saved.getpixel((0, 0)) == ImageColor.getrgb(colour)


FILE = {"filename": "a.png", "subfolder": "x", "type": "temp"}


@pytest.mark.parametrize(
    ("listed", "files"),
    [
        ([FILE], [FILE]),
        ([{**FILE, "format": "video/h264", "frame": 3}], [FILE]),
        ([{"filename": "a.png"}], [{"filename": "a.png", "subfolder": "", "type": "output"}]),
        ([{"source": "data:image/png;base64,AA=="}, "text", {"filename": None}, FILE], [FILE]),
        ([], []),
        (None, []),
    ],
)
def test_images_are_shown_as_the_node_lists_them(tmp_path: Path, listed: object, files: list[object]) -> None:
    source = f"""class Shows:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "show", True
    INPUT_TYPES = classmethod(lambda s: {{"required": {{}}}})
    def show(self): return {{"ui": {{"images": {listed!r}}}}}
NODE_CLASS_MAPPINGS = {{"Shows": Shows}}
"""
    (tmp_path / "shows.py").write_text(source)
    runs = Runs(with_custom(registry(), tmp_path), tmp_path / "output")
    shown = runs({"1": node("Shows")}, "1").shown["1"]
    assert shown.record() == {"images": listed}
    assert [asdict(image) for image in shown.images] == files

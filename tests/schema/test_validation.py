"""Validation answers as ComfyUI 0.8.0 does (observed), and better where that answer is useless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from reference_nodes import registry
from usoflow.nodes import registry as our_nodes
from usoflow.schema.validation import ValidationResult, validate

Json = dict[str, Any]
Change = Callable[[Json], None]


class Files:
    """Some files."""

    def list(self, folder: str) -> list[str]:
        return {"checkpoints": ["flux1-dev-bf16.safetensors", "flux1-dev-fp8.safetensors"]}.get(folder, [])

    def exists(self, folder: str, name: str) -> bool:
        return (folder, name) in {("input", "a.png"), ("output", "b.png")}


def prompt() -> Json:
    sampler = {
        "seed": 5,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    links = {"model": ["95", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["51", 0]}
    cache = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    scale = {"image": ["47", 0], "upscale_method": "area", "largest_size": 512}
    method = {"conditioning": ["6", 0], "reference_latents_method": "uxo/uno"}
    return {
        "30": node("CheckpointLoaderSimple", ckpt_name="flux1-dev-fp8.safetensors"),
        "95": node("EasyCache", model=["30", 0], **cache),
        "6": node("CLIPTextEncode", text="x", clip=["30", 1]),
        "47": node("LoadImage", image="a.png"),
        "108": node("ImageScaleToMaxDimension", **scale),
        "51": node("VAEEncode", pixels=["108", 0], vae=["30", 2]),
        "41": node("FluxKontextMultiReferenceLatentMethod", **method),
        "31": node("KSampler", **sampler, **{**links, "positive": ["41", 0]}),
        "8": node("VAEDecode", samples=["31", 0], vae=["30", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="x"),
    }


def node(class_type: str, **inputs: Any) -> Json:
    return {"class_type": class_type, "inputs": inputs}


def run(change: Change | None = None, **options: Any) -> ValidationResult:
    graph = prompt()
    if change:
        change(graph)
    return validate(graph, registry(), Files(), **options)


def setting(key: str, **inputs: Any) -> Change:
    return lambda graph: graph[key]["inputs"].update(inputs)


def without(key: str, name: str) -> Change:
    return lambda graph: graph[key]["inputs"].pop(name)


CHOICES = "['offset', 'index', 'uxo/uno', 'index_timestep_zero']"
CHECKPOINTS = "['flux1-dev-bf16.safetensors', 'flux1-dev-fp8.safetensors']"
BAD_LINK = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
INNER = "Exception when validating inner node"
NOT_INT = "invalid literal for int() with base 10: 'abc'"
NO_INT = "Failed to convert an input value to a INT value"
NO_BOOLEAN = "Failed to convert an input value to a BOOLEAN value"
NO_TEXT = "Failed to convert an input value to a STRING value"

# change of the prompt; the node with the error; its type, message, details, and the input it names
CASES: dict[str, tuple[Change, str, str, str, str, str]] = {
    "missing widget": (
        without("31", "seed"),
        "31", "required_input_missing", "Required input is missing", "seed", "seed",
    ),
    "missing link": (
        without("31", "positive"),
        "31", "required_input_missing", "Required input is missing", "positive", "positive",
    ),
    "wrong type": (
        setting("31", model=["30", 1]),
        "31", "return_type_mismatch", "Return type mismatch between linked nodes",
        "model, received_type(CLIP) mismatch input_type(MODEL)", "model",
    ),
    "slot out of range": (
        setting("31", model=["30", 7]),
        "31", "exception_during_inner_validation", INNER, "tuple index out of range", "samples",
    ),
    "negative slot": (
        setting("31", model=["30", -1]),
        "31", "exception_during_inner_validation", INNER, "tuple index out of range", "samples",
    ),
    "no such node": (
        setting("31", model=["999", 0]),
        "31", "exception_during_inner_validation", INNER, "'999'", "samples",
    ),
    "link of length 1": (
        setting("31", model=["30"]),
        "31", "bad_linked_input", BAD_LINK, "model", "model",
    ),
    "text for a link": (  # the reference accepts it and fails when it runs
        setting("31", model="abc"),
        "31", "bad_linked_input", BAD_LINK, "model", "model",
    ),
    "too small": (
        setting("31", steps=0),
        "31", "value_smaller_than_min", "Value 0 smaller than min of 1", "steps", "steps",
    ),
    "too big": (
        setting("31", steps=10001),
        "31", "value_bigger_than_max", "Value 10001 bigger than max of 10000", "steps", "steps",
    ),
    "too big, float": (
        setting("95", reuse_threshold=3.5),
        "95", "value_bigger_than_max", "Value 3.5 bigger than max of 3.0",
        "reuse_threshold", "reuse_threshold",
    ),
    "whole number for a float": (
        setting("31", cfg=-1),
        "31", "value_smaller_than_min", "Value -1.0 smaller than min of 0.0", "cfg", "cfg",
    ),
    "not a number": (
        setting("31", steps="abc"),
        "31", "invalid_input_type", NO_INT, f"steps, abc, {NOT_INT}", "steps",
    ),
    "missing checkpoint": (
        setting("30", ckpt_name="nope.safetensors"),
        "30", "value_not_in_list", "Value not in list",
        f"ckpt_name: 'nope.safetensors' not in {CHECKPOINTS}", "ckpt_name",
    ),
    "unknown option of many": (
        setting("31", sampler_name="nope"),
        "31", "value_not_in_list", "Value not in list",
        "sampler_name: 'nope' not in (list of length 44)", "sampler_name",
    ),
    "unknown option of few": (
        setting("41", reference_latents_method="bad"),
        "41", "value_not_in_list", "Value not in list",
        f"reference_latents_method: 'bad' not in {CHOICES}", "reference_latents_method",
    ),
    "missing picture": (
        setting("47", image="nope.png"),
        "47", "custom_validation_failed", "Custom validation failed for node",
        "image - Invalid image file: nope.png", "image",
    ),
    "picture elsewhere": (
        setting("47", image="a.png [output]"),
        "47", "custom_validation_failed", "Custom validation failed for node",
        "image - Invalid image file: a.png [output]", "image",
    ),
    # what the reference turns into something nobody meant
    "neither true nor false": (
        setting("95", verbose="no"),
        "95", "invalid_input_type", NO_BOOLEAN, "verbose, no, neither true nor false", "verbose",
    ),
    "object for a text": (
        setting("6", text={"a": 1}),
        "6", "invalid_input_type", NO_TEXT, "text, {'a': 1}, a text is needed, not dict", "text",
    ),
    "infinite": (
        setting("31", cfg=float("nan")),
        "31", "invalid_input_type", "Failed to convert an input value to a FLOAT value",
        "cfg, nan, nan is not a finite number", "cfg",
    ),
}  # fmt: skip


def test_good_prompt() -> None:
    result = run()
    assert result.error is None
    assert result.outputs == ("9",)
    assert result.node_errors == {}


@pytest.mark.parametrize("name", CASES)
def test_node_error(name: str) -> None:
    change, key, type_, message, details, input_name = CASES[name]
    result = run(change)
    assert result.outputs == ()
    assert result.error == {
        "type": "prompt_outputs_failed_validation",
        "message": "Prompt outputs failed validation",
        "details": "",
        "extra_info": {},
    }
    assert list(result.node_errors) == [key]
    entry = result.node_errors[key]
    assert entry["dependent_outputs"] == ["9"]
    assert entry["class_type"] == prompt()[key]["class_type"]
    (error,) = entry["errors"]
    assert (error["type"], error["message"], error["details"]) == (type_, message, details)
    assert error["extra_info"]["input_name"] == input_name


def test_extra_info() -> None:
    (error,) = run(setting("31", steps=0)).node_errors["31"]["errors"]
    config = ["INT", {"default": 20, "min": 1, "max": 10000}]
    assert error["extra_info"] == {"input_name": "steps", "input_config": config, "received_value": 0}
    (error,) = run(setting("31", sampler_name="nope")).node_errors["31"]["errors"]
    assert error["extra_info"] == {
        "input_name": "sampler_name",
        "input_config": None,
        "received_value": "nope",
    }


def test_all_errors_of_a_node_are_told() -> None:
    errors = run(setting("31", steps=0, cfg=-1.0)).node_errors["31"]["errors"]
    assert {error["details"] for error in errors} == {"cfg", "steps"}


def unknown(graph: Json) -> None:
    graph["95"]["class_type"] = "NoSuchNode"


def typeless(graph: Json) -> None:
    del graph["9"]["class_type"]


def not_an_object(graph: Json) -> None:
    graph["9"] = 5


@pytest.mark.parametrize(
    ("change", "message", "details"),
    [
        (unknown, "Cannot execute because node NoSuchNode does not exist.", "Node ID '#95'"),
        (typeless, "Cannot execute because a node is missing the class_type property.", "Node ID '#9'"),
        (not_an_object, "Cannot execute because a node is missing the class_type property.", "Node ID '#9'"),
    ],
)
def test_unusable_nodes(change: Change, message: str, details: str) -> None:
    result = run(change)
    assert result.error == {
        "type": "invalid_prompt",
        "message": message,
        "details": details,
        "extra_info": {},
    }
    assert result.node_errors == {}


@pytest.mark.parametrize("graph", [{}, [], {"1": node("ImageInvert", image=["1", 0])}])
def test_no_outputs(graph: Any) -> None:
    result = validate(graph, registry(), Files())
    assert result.error is not None
    assert (result.error["type"], result.error["message"]) == ("prompt_no_outputs", "Prompt has no outputs")


def test_prompt_is_no_object() -> None:
    error = validate("text", registry(), Files()).error
    assert error is not None
    assert error["type"] == "invalid_prompt"


def second_output(**inputs: Any) -> Change:
    return lambda graph: graph.update({"200": node("SaveImage", filename_prefix="y", **inputs)})


def test_two_outputs_both_bad() -> None:
    def change(graph: Json) -> None:
        setting("31", steps=0)(graph)
        second_output(images=["31", 7])(graph)

    result = run(change)
    assert result.error is not None
    assert result.error["details"] == "Exception when validating node: tuple index out of range"
    assert result.node_errors["200"]["errors"][0]["type"] == "exception_during_validation"
    assert result.node_errors["200"]["dependent_outputs"] == ["200"]


def test_errors_of_an_output_itself_are_in_the_details() -> None:
    result = run(without("9", "images"))
    assert result.error is not None
    assert result.error["details"] == "Required input is missing: images"


def test_node_without_inputs() -> None:
    result = validate({"1": {"class_type": "SaveImage"}}, registry(), Files())
    assert result.error is not None
    assert result.error["details"] == "Exception when validating node: 'inputs'"


def test_a_good_output_runs_although_another_is_bad() -> None:
    result = run(second_output())
    assert result.error is None
    assert result.outputs == ("9",)
    assert list(result.node_errors) == ["200"]


def test_errors_name_all_outputs_that_depend() -> None:
    def change(graph: Json) -> None:
        setting("30", ckpt_name="nope")(graph)
        second_output(images=["8", 0])(graph)

    assert run(change).node_errors["30"]["dependent_outputs"] == ["9", "200"]


def test_targets() -> None:
    change = second_output(images=["47", 0])
    assert run(change).outputs == ("9", "200")
    assert run(change, targets=["200"]).outputs == ("200",)


def test_dead_nodes_are_not_checked() -> None:
    assert run(lambda graph: graph.update({"117": node("CLIPVisionEncode", crop="center")})).error is None


def test_cycle_is_named() -> None:
    result = run(setting("30", ckpt_name=["8", 0]))
    errors = result.node_errors["30"]["errors"]
    assert {error["type"] for error in errors} == {"return_type_mismatch", "dependency_cycle"}
    cycle = next(error for error in errors if error["type"] == "dependency_cycle")
    assert cycle["details"] == "8 -> 30 -> 95 -> 31 -> 8"


def test_node_linked_to_itself() -> None:
    result = validate(
        {"1": node("ImageInvert", image=["1", 0]), "2": node("PreviewImage", images=["1", 0])},
        registry(),
        Files(),
    )
    assert result.node_errors["1"]["errors"][0]["details"] == "1 -> 1"


def test_long_chain() -> None:
    graph = {str(n): node("ImageInvert", image=[str(n - 1), 0]) for n in range(1, 20_000)}
    graph["0"] = node("LoadImage", image="a.png")
    graph["end"] = node("PreviewImage", images=["19999", 0])
    assert validate(graph, registry(), Files()).outputs == ("end",)


@pytest.mark.parametrize(
    ("key", "name", "sent", "received"),
    [
        ("31", "steps", "20", 20),
        ("31", "steps", 20.0, 20),
        ("31", "cfg", "3.5", 3.5),
        ("95", "verbose", "False", False),
        ("6", "text", 5, "5"),
        ("6", "text", {"__value__": "x"}, "x"),
        ("41", "conditioning", ["6", 0], ["6", 0]),
        ("47", "image", "b.png [output]", "b.png [output]"),
    ],
)
def test_conversion(key: str, name: str, sent: Any, received: Any) -> None:
    result = run(setting(key, **{name: sent}))
    assert result.error is None
    value = result.prompt[key]["inputs"][name]
    assert value == received
    assert type(value) is type(received)


def test_a_list_that_is_a_value_does_not_become_a_link() -> None:
    value = {"__value__": ["o", 0]}
    result = validate({"o": node("PreviewAny", source=value)}, our_nodes(), Files())
    assert (result.error, result.prompt["o"]["inputs"]) == (None, {"source": value})


def test_null_for_an_optional_link_is_no_link() -> None:
    """Clients write out what they leave empty."""

    def change(graph: Json) -> None:
        graph["ref"] = node("ReferenceLatent", conditioning=["6", 0], latent=None)
        graph["41"]["inputs"]["conditioning"] = ["ref", 0]

    result = run(change)
    assert (result.error, result.outputs) == (None, ("9",))
    assert result.prompt["ref"]["inputs"] == {"conditioning": ["6", 0]}
    (error,) = run(setting("31", model=None)).node_errors["31"]["errors"]
    assert error["type"] == "bad_linked_input"


def test_remedy_for_a_missing_model() -> None:
    result = run(
        setting("30", ckpt_name="nope.safetensors"), remedy=lambda folder, name: f"put {name} into {folder}"
    )
    (error,) = result.node_errors["30"]["errors"]
    assert error["type"] == "value_not_in_list"
    assert error["extra_info"]["remedy"] == "put nope.safetensors into checkpoints"


@pytest.mark.parametrize(
    "link",
    [
        ["30", "0"],
        ["30", True],
        [["30"], 0],
        [{}, 0],
        [None, 0],
        [30, 0],
        [],
        ["30", 0, 0],
        ["30", 0.0],
        ["30", 2**80],
    ],
)
def test_strange_links_are_errors_not_exceptions(link: Any) -> None:
    result = run(setting("31", model=link))
    assert result.outputs == ()
    assert list(result.node_errors) == ["31"]


def test_a_windows_name_of_a_model_in_a_folder() -> None:
    class InFolder(Files):
        def list(self, folder: str) -> list[str]:
            return ["flux/a.safetensors"]

    result = validate(with_checkpoint("flux\\a.safetensors"), registry(), InFolder())
    assert result.error is None
    assert result.prompt["30"]["inputs"]["ckpt_name"] == "flux/a.safetensors"


def with_checkpoint(name: str) -> dict[str, Json]:
    graph = prompt()
    setting("30", ckpt_name=name)(graph)
    return graph


def test_a_link_that_leads_nowhere_names_the_output_by_which_its_node_is_asked_for() -> None:
    graph = {
        "pad": node("ImagePadForOutpaint", image=["999", 0], left=8, top=0, right=0, bottom=0, feathering=4),
        "picture": node("MaskToImage", mask=["pad", 1]),
        "out": node("PreviewImage", images=["picture", 0]),
    }
    (error,) = validate(graph, our_nodes(), Files()).node_errors["pad"]["errors"]
    assert error["extra_info"]["input_name"] == "mask"
    assert error["extra_info"]["linked_node"] == ["pad", 1]

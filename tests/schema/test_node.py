"""The schema follows from the signature."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import pytest

from reference_nodes import NoFiles
from usoflow.schema.node import Node, NodeRegistry, node
from usoflow.schema.object_info import render
from usoflow.schema.specs import Choice, InputImage, Int, ModelFile, Optional, Socket, Text, Tip

if TYPE_CHECKING:
    from somewhere import NodeContext, Record  # only mypy would import it

Image = Annotated[Any, Socket("IMAGE")]
Seed = Int(min=0, max=9, control_after_generate=True)


@node("Example", category="a/b", display_name="An Example", output_names=("picture", "width"))
def example(
    *,
    image: Image,
    seed: Annotated[int, Seed, Tip("starts the noise")] = 3,
    positive: Image,
    text: Annotated[str, Text(multiline=True, dynamic_prompts=True)],
    method: Annotated[str, Choice(("one", "two"))] = "two",
    file: Annotated[str, InputImage()],
    model: Annotated[str, ModelFile("loras")],
    scale: float = 1.5,
    mask: Image | None = None,
    device: Annotated[str, Choice(("default", "cpu")), Optional()] = "default",
    context: NodeContext,
) -> tuple[Image, int]:
    """Show every kind
    of input.

    Not part of the description.
    """
    return image, 1


@node("Save", category="c", output_node=True, hidden=("prompt", "extra_pnginfo"))
def save(images: Image, filename_prefix: str = "x") -> Record: ...


class OneFile(NoFiles):
    def list(self, folder: str) -> list[str]:
        return [f"{folder}.file"]


def test_rendered() -> None:
    info = render(example.schema, OneFile())
    assert info["input"] == {
        "required": {
            "image": ["IMAGE", {}],
            "seed": [
                "INT",
                {
                    "default": 3,
                    "min": 0,
                    "max": 9,
                    "control_after_generate": True,
                    "tooltip": "starts the noise",
                },
            ],
            "positive": ["IMAGE", {}],
            "text": ["STRING", {"multiline": True, "dynamicPrompts": True}],
            "method": [["one", "two"], {"default": "two"}],
            "file": [["input.file"], {"image_upload": True}],
            "model": [["loras.file"], {}],
            "scale": ["FLOAT", {"default": 1.5}],
        },
        "optional": {"mask": ["IMAGE", {}], "device": [["default", "cpu"], {}]},
    }
    assert info["input_order"]["required"] == [*info["input"]["required"]]
    assert (info["output"], info["output_name"]) == (["IMAGE", "INT"], ["picture", "width"])
    assert info["output_is_list"] == [False, False]
    assert (info["name"], info["display_name"], info["category"]) == ("Example", "An Example", "a/b")
    assert info["description"] == "Show every kind of input."
    assert info["output_node"] is False


def test_output_node() -> None:
    info = render(save.schema, NoFiles())
    assert info["output_node"] is True
    assert info["output"] == []
    assert info["input"]["hidden"] == {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    assert info["display_name"] == "Save"


def test_context_is_no_input() -> None:
    assert example.schema.takes_context
    assert not save.schema.takes_context
    assert example.schema.input("context") is None


def test_a_node_is_still_its_function() -> None:
    picture = object()
    result = example(image=picture, positive=None, text="", file="", model="", context=None)  # type: ignore[arg-type]
    assert result == (picture, 1)


def test_annotation_without_kind() -> None:
    def bad(image: object) -> int: ...

    with pytest.raises(TypeError, match="image"):
        node("Bad", category="x")(bad)


def test_output_names_must_fit() -> None:
    def bad() -> int: ...

    with pytest.raises(TypeError, match="1 outputs but 2"):
        node("Bad", category="x", output_names=("a", "b"))(bad)


def test_registry() -> None:
    module = ModuleType("some_nodes")
    vars(module).update(example=example, save=save, other=5)
    found = NodeRegistry.from_modules([module])
    assert list(found) == ["Example", "Save"]
    assert found["Save"] is save
    assert found.schema("Save") is save.schema
    assert found.schema("Nothing") is None
    with pytest.raises(ValueError, match="Save"):
        NodeRegistry([save, Node(save.schema, print)])

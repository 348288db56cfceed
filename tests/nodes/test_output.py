"""What is shown or sent and leaves no file."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from usoflow.nodes import output, registry
from usoflow.nodes.context import NodeContext
from usoflow.schema.object_info import render
from usoflow.settings import find_folders


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_sent_as_they_are_saved(context: NodeContext, channels: int) -> None:
    told: list[tuple[Any, ...]] = []
    images = torch.linspace(-0.5, 1.5, 2 * 4 * 6 * channels).reshape(2, 4, 6, channels)
    given = output.send_image(images, context=replace(context, report=lambda *values: told.append(values)))
    assert given == ()
    assert [values[:3] for values in told] == [(1, 2, None), (2, 2, None)]
    for (*_, png), expected in zip(told, (images.clamp(0, 1) * 255).byte().numpy(), strict=True):
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.format == "PNG"
            assert np.array_equal(np.asarray(picture).reshape(expected.shape), expected)
    assert not context.folders.output.exists()


def test_the_editor_is_told() -> None:
    info = render(registry()["SaveImageWebsocket"].schema, find_folders())
    assert (info["category"], info["output_node"], info["output"]) == ("api/image", True, [])
    assert info["input"] == {"required": {"images": ["IMAGE", {}]}}


class Odd:
    def __str__(self) -> str:
        return "odd"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a 'b'\n", "a 'b'\n"),
        (3, "3"),
        (0.5, "0.5"),
        (True, "True"),
        (None, "None"),
        ([1, "ä"], '[1, "ä"]'),
        ({"a": None}, '{"a": null}'),
        (torch.zeros(2), "tensor([0., 0.])"),
        (Odd(), "odd"),
        ([Odd], f"[{Odd!r}]"),
    ],
)
def test_any_value_as_a_text(value: Any, text: str) -> None:
    assert output.preview_any(value).record() == {"text": [text]}

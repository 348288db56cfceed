"""Single rules of conversion that no pair shows; small workflows made by hand."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from reference_nodes import registry
from usoflow.errors import UsoflowError
from usoflow.workflow import document
from usoflow.workflow.flatten import MAX_NODES, Conversion, fits, flatten

Json = dict[str, Any]
IN, OUT = -10, -20


def node(id: int, type: str, inputs: Json | None = None, outputs: str = "", **more: Any) -> Json:
    """`inputs`: name -> link id, or (link id, type); a name with a "!" is a field's input."""
    return {
        "id": id,
        "type": type,
        "inputs": [slot(name, link) for name, link in (inputs or {}).items()],
        "outputs": [{"name": type_, "type": type_} for type_ in outputs.split()],
        **more,
    }


def slot(name: str, link: Any) -> Json:
    key, type_ = link if isinstance(link, tuple) else (link, "IMAGE")
    widget = {"widget": {"name": name[:-1]}} if name.endswith("!") else {}
    return {"name": name.removesuffix("!"), "type": type_, "link": key, **widget}


def workflow(nodes: list[Json], links: list[Any], *subgraphs: Json) -> Json:
    return {"nodes": nodes, "links": links, "definitions": {"subgraphs": list(subgraphs)}, "version": 0.4}


def subgraph(id: str, inputs: str, nodes: list[Json], links: list[Any]) -> Json:
    return {
        "id": id,
        "name": id,
        "inputs": [{"name": name} for name in inputs.split()],
        "nodes": nodes,
        "links": links,
    }


def convert(data: Json) -> Conversion:
    return flatten(document.parse(data), registry(), now=datetime(2026, 3, 4))


def inputs(data: Json) -> dict[str, Json]:
    return {key: dict(node.inputs) for key, node in convert(data).prompt.nodes.items()}


LOAD = node(1, "LoadImage", outputs="IMAGE MASK", widgets_values=["a.png", "image"])
SAVE = node(9, "PreviewImage", {"images": 9})


def test_links_as_objects() -> None:
    link = {"id": 9, "origin_id": 1, "origin_slot": 0, "target_id": 9, "target_slot": 0, "type": "IMAGE"}
    data = {**workflow([LOAD, SAVE], [link]), "version": 1}
    assert inputs(data) == {"1": {"image": "a.png"}, "9": {"images": ["1", 0]}}


def test_values_by_name_only() -> None:
    scale = node(2, "ImageScaleBy", widgets_values={"scale_by": 2.5, "upscale_method": "area"})
    assert inputs(workflow([scale], []))["2"] == {"upscale_method": "area", "scale_by": 2.5}


def test_missing_values_are_the_defaults() -> None:
    sampler = inputs(workflow([node(2, "KSampler", widgets_values=[7, "fixed", 12])], []))["2"]
    assert sampler["seed"] == 7
    assert sampler["steps"] == 12
    assert (sampler["cfg"], sampler["sampler_name"], sampler["denoise"]) == (8.0, "euler", 1.0)


def test_a_missing_file_is_left_out() -> None:
    assert inputs(workflow([node(2, "VAELoader")], []))["2"] == {}


def test_lists_are_wrapped() -> None:
    text = node(2, "CLIPTextEncode", widgets_values=[["a", 1]])
    assert inputs(workflow([text], []))["2"] == {"text": {"__value__": ["a", 1]}}


def test_lists_of_primitives_are_wrapped() -> None:
    primitive = node(1, "PrimitiveNode", outputs="STRING", widgets_values=[["2", 0], "fixed"])
    text = node(2, "CLIPTextEncode", {"text!": (5, "STRING")}, widgets_values=["x"])
    data = workflow([primitive, text], [[5, 1, 0, 2, 0, "STRING"]])
    assert inputs(data)["2"] == {"text": {"__value__": ["2", 0]}}


@pytest.mark.parametrize("mode", [0, 1, 3])
def test_other_modes_are_executed(mode: int) -> None:
    assert "1" in inputs(workflow([{**LOAD, "mode": mode}], []))


def test_links_that_lead_nowhere_are_dropped() -> None:
    assert inputs(workflow([SAVE], [[9, 77, 0, 9, 0, "IMAGE"]])) == {"9": {}}
    assert inputs(workflow([SAVE], [])) == {"9": {}}


def test_reroutes_and_bypasses_in_a_row() -> None:
    chain = [
        node(2, "Reroute", {"": (2, "*")}, "IMAGE"),
        node(3, "ImageInvert", {"image": 3}, "IMAGE", mode=4),
        node(4, "Reroute", {"": (4, "*")}, "IMAGE"),
    ]
    links = [
        [2, 1, 0, 2, 0, "IMAGE"],
        [3, 2, 0, 3, 0, "IMAGE"],
        [4, 3, 0, 4, 0, "IMAGE"],
        [9, 4, 0, 9, 0, "IMAGE"],
    ]
    assert inputs(workflow([LOAD, *chain, SAVE], links))["9"] == {"images": ["1", 0]}


def test_links_in_a_circle() -> None:
    loop = [node(2, "Reroute", {"": (3, "*")}, "IMAGE"), node(3, "Reroute", {"": (2, "*")}, "IMAGE")]
    links = [[2, 2, 0, 3, 0, "*"], [3, 3, 0, 2, 0, "*"], [9, 3, 0, 9, 0, "*"]]
    with pytest.raises(UsoflowError, match="circle"):
        convert(workflow([*loop, SAVE], links))


def test_a_long_chain_of_reroutes() -> None:
    count = 5000
    chain = [node(n, "Reroute", {"": (n, "*")}, "IMAGE") for n in range(10, count)]
    links = [[n, n - 1 if n > 10 else 1, 0, n, 0, "*"] for n in range(10, count)]
    data = workflow([LOAD, *chain, SAVE], [*links, [9, count - 1, 0, 9, 0, "*"]])
    assert inputs(data)["9"] == {"images": ["1", 0]}


def invert_twice(type_: str = "sub", **more: Any) -> tuple[Json, Json]:
    """A subgraph's node (id 5), and the subgraph: scale by a promoted factor."""
    inner = [
        node(
            2, "ImageScaleBy", {"image": 1, "scale_by!": (2, "FLOAT")}, "IMAGE", widgets_values=["area", 2.0]
        ),
    ]
    links = [[1, IN, 0, 2, 0, "IMAGE"], [2, IN, 1, 2, 1, "FLOAT"], [3, 2, 0, OUT, 0, "IMAGE"]]
    host = node(5, type_, {"image": 5}, "IMAGE", **more)
    return host, subgraph(type_, "image factor", inner, links)


HOST_LINKS = [[5, 1, 0, 5, 0, "IMAGE"], [9, 5, 0, 9, 0, "IMAGE"]]


def scale_by(**more: Any) -> Any:
    host, definition = invert_twice(**more)
    converted = inputs(workflow([LOAD, host, SAVE], HOST_LINKS, definition))
    assert converted["9"] == {"images": ["5:2", 0]}
    assert converted["5:2"]["image"] == ["1", 0]
    return converted["5:2"]["scale_by"]


def test_inner_value_where_the_host_has_none() -> None:
    assert scale_by() == 2.0


def test_host_value() -> None:
    assert scale_by(widgets_values=[3.0]) == 3.0
    assert scale_by(widgets_values_named={"factor": 3.5}) == 3.5


def test_proxy_widgets_tell_the_order_of_host_values() -> None:
    proxies = {"proxyWidgets": [["2", "upscale_method"], ["2", "scale_by"]]}
    assert scale_by(properties=proxies, widgets_values=["area", 4.0]) == 4.0
    own_input = {"proxyWidgets": [["-1", "factor"]]}
    assert scale_by(properties=own_input, widgets_values=[5.0]) == 5.0
    assert scale_by(properties=proxies, widgets_values=[]) == 2.0


def test_quarantined_host_value_is_ignored() -> None:
    quarantine = [{"originalEntry": ["-1", "factor"], "hostValue": 7.0}]
    assert scale_by(widgets_values=[3.0], properties={"proxyWidgetErrorQuarantine": quarantine}) == 3.0


def test_a_link_into_the_host_wins() -> None:
    host, definition = invert_twice(widgets_values=[3.0])
    host["inputs"].append(slot("factor!", (6, "FLOAT")))
    number = node(7, "PrimitiveFloat", outputs="FLOAT", widgets_values=[6.0])
    data = workflow([LOAD, number, host, SAVE], [*HOST_LINKS, [6, 7, 0, 5, 1, "FLOAT"]], definition)
    assert inputs(data)["5:2"]["scale_by"] == ["7", 0]


def test_two_uses_of_one_subgraph() -> None:
    first, definition = invert_twice(widgets_values=[3.0])
    second = {**first, "id": 6, "inputs": [slot("image", 6)], "widgets_values": [4.0]}
    links = [[5, 1, 0, 5, 0, "IMAGE"], [6, 5, 0, 6, 0, "IMAGE"], [9, 6, 0, 9, 0, "IMAGE"]]
    converted = inputs(workflow([LOAD, first, second, SAVE], links, definition))
    assert converted["9"] == {"images": ["6:2", 0]}
    assert converted["6:2"]["image"] == ["5:2", 0]
    assert (converted["5:2"]["scale_by"], converted["6:2"]["scale_by"]) == (3.0, 4.0)


def test_recursive_subgraph() -> None:
    host, _ = invert_twice()
    definitions = [subgraph("sub", "", [node(1, "other")], []), subgraph("other", "", [node(2, "sub")], [])]
    with pytest.raises(UsoflowError) as raised:
        convert(workflow([LOAD, host, SAVE], HOST_LINKS, *definitions))
    assert raised.value.code == "subgraph_recursive"


def test_subgraphs_that_multiply_without_end() -> None:
    doubling = [subgraph(f"s{n}", "", [node(1, f"s{n + 1}"), node(2, f"s{n + 1}")], []) for n in range(60)]
    with pytest.raises(UsoflowError, match=str(MAX_NODES)):
        convert(workflow([node(1, "s0")], [], *doubling))


def test_unknown_type_named_by_the_file() -> None:
    fields = {"image": 5, "strength!": (None, "FLOAT"), "seed!": (None, "INT"), "mode!": (None, "COMBO")}
    strange = node(2, "Strange", fields, "IMAGE", widgets_values=[0.5, 7, "randomize", "soft", "more"])
    conversion = convert(workflow([LOAD, strange], [[5, 1, 0, 2, 0, "IMAGE"]]))
    assert conversion.prompt.nodes["2"].inputs == {
        "strength": 0.5,
        "seed": 7,
        "mode": "soft",
        "UNKNOWN": "more",
        "image": ["1", 0],
    }
    assert conversion.warnings == ("node 2: there is no node type Strange",)


def test_texts() -> None:
    conversion = convert(workflow([node(2, "CLIPTextEncode", widgets_values=["a {b|c} // d"])], []))
    assert conversion.prompt.nodes["2"].inputs["text"] == "a b "
    assert conversion.warnings == ("node 2, text: of the alternatives in braces, the first is taken",)


def test_texts_without_choice_raise_no_warning() -> None:
    assert convert(workflow([node(2, "CLIPTextEncode", widgets_values=["a {b} | c"])], [])).warnings == ()


def test_file_names() -> None:
    sampler = node(2, "KSampler", widgets_values=[7, "fixed"], properties={"Node name for S&R": "KSampler"})
    save = node(
        3, "SaveImage", widgets_values=["%date:yyyy%_%KSampler.seed%_%Nobody.seed%_%width%"], title="x"
    )
    conversion = convert(workflow([sampler, save], []))
    assert conversion.prompt.nodes["3"].inputs["filename_prefix"] == "2026_7_%Nobody.seed%_%width%"
    assert conversion.warnings == ("filename_prefix: there is no Nobody.seed",)


def file_name(prefix: str, *nodes: Json) -> Any:
    return inputs(workflow([*nodes, node(99, "SaveImage", widgets_values=[prefix])], []))["99"][
        "filename_prefix"
    ]


def test_file_names_with_a_default_title() -> None:
    """The file stores only titles that the user has given."""
    empty = node(1, "EmptyLatentImage", widgets_values=[640, 512, 1])
    assert file_name("%Empty Latent Image.width%", empty) == "640"


def test_file_names_prefer_the_name_that_is_meant_for_them() -> None:
    titled = node(1, "EmptyLatentImage", title="Size", widgets_values=[640, 512, 1])
    named = node(
        2, "EmptyLatentImage", properties={"Node name for S&R": "Size"}, widgets_values=[320, 512, 1]
    )
    assert file_name("%Size.width%", titled, named) == "320"


@pytest.mark.parametrize(("title", "name"), [("Seed", "Seed"), ("", "Primitive")])
def test_file_names_with_the_value_of_a_primitive(title: str, name: str) -> None:
    primitive = node(1, "PrimitiveNode", title=title, widgets_values=[7, "fixed"])
    assert file_name(f"%{name}.value%", primitive) == "7"


@pytest.mark.parametrize("type_", ["workflow>Two steps", "workflow/Two steps"])
def test_group_nodes_are_to_be_converted(type_: str) -> None:
    with pytest.raises(UsoflowError, match=r"node 3 is a group node \(Two steps\)") as raised:
        convert(workflow([node(3, type_)], []))
    assert raised.value.code == "workflow_invalid"
    assert "to a subgraph" in raised.value.remedy


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([{"id": 1, "type": "A"}, {"id": "1", "type": "B"}], "the id 1"),
        ([{"id": True, "type": "A"}], "True"),
        ([{"type": "A"}], "id"),
        ([{"id": 1}], "type"),
        ([5], "not an object"),
        ([{"id": 1, "type": "A", "mode": "x"}], "node 1: mode"),
        ([{"id": 1, "type": "A", "inputs": {}}], "node 1: inputs"),
        ([{"id": 1, "type": "A", "inputs": [{"name": 5}]}], "node 1"),
        ([{"id": 1, "type": "A", "widgets_values": "x"}], "widgets_values"),
    ],
)
def test_wrong_nodes_are_named(nodes: list[Any], told: str) -> None:
    with pytest.raises(UsoflowError) as raised:
        document.parse({"nodes": nodes})
    assert raised.value.code == "workflow_invalid"
    assert told in raised.value.detail


@pytest.mark.parametrize("link", [5, [1, 2, 3], {"id": 1}, [1, 1, "x", 2, 0, "A"], [[], 1, 0, 2, 0, "A"]])
def test_wrong_links(link: Any) -> None:
    with pytest.raises(UsoflowError) as raised:
        document.parse({"nodes": [], "links": [link]})
    assert raised.value.code == "workflow_invalid"


def test_the_upload_button_stands_after_the_last_required_field() -> None:
    load = node(1, "LoadImageMask", outputs="MASK", widgets_values=["m.png", "red", "image"])
    assert inputs(workflow([load], []))["1"] == {"image": "m.png", "channel": "red"}


def test_file_names_of_two_nodes_of_one_name_take_the_first() -> None:
    nodes = [
        node(n, "EmptyLatentImage", properties={"Node name for S&R": "Size"}, widgets_values=[width, 512, 1])
        for n, width in ((1, 640), (2, 320))
    ]
    assert file_name("%Size.width%", *nodes) == "640"


def test_types_fit_in_any_case() -> None:
    assert fits("image,mask", "MASK")
    assert not fits("image", "MASK")


def test_an_address_that_is_cut_is_told() -> None:
    """Comments are meant; that // in an address begins one is not."""
    conversion = convert(workflow([node(2, "CLIPTextEncode", widgets_values=["see https://a.b/c"])], []))
    assert conversion.prompt.nodes["2"].inputs["text"] == "see https:"
    assert conversion.warnings == (
        "node 2, text: // begins a comment, in an address too, and what follows is left out",
    )


def test_file_names_with_the_value_of_a_field_that_a_link_feeds() -> None:
    """As in the editor, which fills in what the field itself holds."""
    width = node(1, "PrimitiveInt", outputs="INT", widgets_values=[7, "fixed"])
    empty = node(2, "EmptyLatentImage", {"width!": (5, "INT")}, title="Size", widgets_values=[640, 512, 1])
    save = node(99, "SaveImage", widgets_values=["%Size.width%x%Size.height%"])
    found = inputs(workflow([width, empty, save], [[5, 1, 0, 2, 0, "INT"]]))
    assert found["2"]["width"] == ["1", 0]
    assert found["99"]["filename_prefix"] == "640x512"


def test_numbers_in_file_names_are_the_editors() -> None:
    sampler = node(1, "KSampler", title="S", widgets_values=[7, "fixed", 12, 8.0, "euler", "simple", 0.5])
    cache = node(2, "EasyCache", title="E", widgets_values=[0.2, 0.15, 0.95, False])
    assert file_name("%S.cfg%_%S.denoise%_%E.verbose%", sampler, cache) == "8_0.5_false"


@pytest.mark.parametrize("values", [[7], {"value": 7}])
def test_a_primitive_with_values_by_name(values: Any) -> None:
    primitive = node(1, "PrimitiveNode", outputs="INT", widgets_values=values)
    empty = node(2, "EmptyLatentImage", {"width!": (5, "INT")}, widgets_values=[64, 64, 1])
    assert inputs(workflow([primitive, empty], [[5, 1, 0, 2, 0, "INT"]]))["2"]["width"] == 7


def test_a_value_that_is_null_is_the_default() -> None:
    """JSON has no NaN: the editor's is written so."""
    assert (
        inputs(workflow([node(2, "KSampler", widgets_values=[7, "fixed", 12, None])], []))["2"]["cfg"] == 8.0
    )


def test_ids_written_as_floats() -> None:
    data = workflow([{**LOAD, "id": 1.0}, {**SAVE, "id": 9.0}], [[9.0, 1.0, 0.0, 9.0, 0.0, "IMAGE"]])
    assert inputs(data)["9"] == {"images": ["1", 0]}


class TestSettersAndGetters:
    """Links without a line, of the extensions KJNodes and Easy-Use."""

    @staticmethod
    def joined(*setters: Json, name: str = "img", get: str = "GetNode") -> Conversion:
        nodes = [
            node(1, "EmptyImage", outputs="IMAGE"),
            *setters,
            node(4, get, outputs="IMAGE", widgets_values=[name]),
            node(3, "SaveImage", {"images": 2}),
        ]
        return convert(workflow(nodes, [[1, 1, 0, 2, 0, "IMAGE"], [2, 4, 0, 3, 0, "IMAGE"]]))

    @pytest.mark.parametrize(("set_", "get"), [("SetNode", "GetNode"), ("easy setNode", "easy getNode")])
    def test_what_is_set_is_got(self, set_: str, get: str) -> None:
        conversion = self.joined(node(2, set_, {"IMAGE": 1}, widgets_values=["img"]), get=get)
        assert conversion.prompt.nodes.keys() == {"1", "3"}
        assert conversion.prompt.nodes["3"].inputs["images"] == ["1", 0]
        assert conversion.warnings == ()

    def test_a_bypassed_setter_sets_and_a_muted_one_does_not(self) -> None:
        for mode, reached in ((4, True), (2, False)):
            setter = node(2, "SetNode", {"IMAGE": 1}, widgets_values=["img"], mode=mode)
            assert ("images" in self.joined(setter).prompt.nodes["3"].inputs) == reached

    def test_what_nobody_sets_is_told(self) -> None:
        conversion = self.joined(node(2, "SetNode", {"IMAGE": 1}, widgets_values=["other"]))
        assert "images" not in conversion.prompt.nodes["3"].inputs
        assert conversion.warnings == ("no node sets 'img', which one gets",)

    def test_a_setter_outside_of_a_subgraph(self) -> None:
        inner = [
            node(4, "GetNode", outputs="IMAGE", widgets_values=["img"]),
            node(5, "SaveImage", {"images": 1}),
        ]
        graph = workflow(
            [
                node(1, "EmptyImage", outputs="IMAGE"),
                node(2, "SetNode", {"IMAGE": 1}, widgets_values=["img"]),
                node(9, "S"),
            ],
            [[1, 1, 0, 2, 0, "IMAGE"]],
            subgraph("S", "", inner, [[1, 4, 0, 5, 0, "IMAGE"]]),
        )
        assert convert(graph).prompt.nodes["9:5"].inputs["images"] == ["1", 0]

    def test_in_a_circle(self) -> None:
        nodes = [
            node(2, "SetNode", {"IMAGE": 1}, widgets_values=["img"]),
            node(4, "GetNode", outputs="IMAGE", widgets_values=["img"]),
            node(3, "SaveImage", {"images": 2}),
        ]
        with pytest.raises(UsoflowError, match="circle"):
            convert(workflow(nodes, [[1, 4, 0, 2, 0, "IMAGE"], [2, 4, 0, 3, 0, "IMAGE"]]))

    def test_a_reroute_of_rgthree(self) -> None:
        nodes = [
            node(1, "EmptyImage", outputs="IMAGE"),
            node(2, "Reroute (rgthree)", {"": 1}, outputs="IMAGE"),
            node(3, "SaveImage", {"images": 2}),
        ]
        graph = workflow(nodes, [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]])
        assert convert(graph).prompt.nodes["3"].inputs["images"] == ["1", 0]

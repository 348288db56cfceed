"""What a run does: which nodes, in which order, how often; what is kept; how it stops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import small
from usoflow.errors import UsoflowError
from usoflow.execution.executor import Executor, RunResult
from usoflow.execution.order import NodeError, in_order
from usoflow.execution.progress import (
    Cancellation,
    Event,
    NodeFinished,
    NodeProgress,
    NodesCached,
    NodeStarted,
)
from usoflow.models.checkpoint import CONFIG_KEY
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.models.vae import AutoEncoder
from usoflow.nodes import registry
from usoflow.nodes.context import NodeContext, Shown
from usoflow.nodes.custom import adapt
from usoflow.schema.node import AnyNode, NodeRegistry, node
from usoflow.schema.specs import Int, Text
from usoflow.settings import find_folders
from usoflow.workflow import metadata
from usoflow.workflow.prompt import Prompt

FP32 = Placement.choose("cpu", "fp32")


class Bench:
    """An executor with folders of its own, and everything that it told."""

    def __init__(self, root: Path, nodes: NodeRegistry) -> None:
        self.executor = Executor(nodes, ModelLibrary(FP32))
        self.root = root
        self.events: list[Event] = []

    def run(
        self,
        prompt: small.Prompt,
        *targets: str,
        listen: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> RunResult:
        (self.root / "input").mkdir(exist_ok=True)
        folders = find_folders(
            models=self.root / "models", inputs=self.root / "input", output=self.root / "output"
        )
        self.events.clear()

        def tell(event: Event) -> None:
            self.events.append(event)
            if listen:
                listen(event)

        return self.executor.run(Prompt.parse(prompt), targets or ("save",), folders, listen=tell, **options)

    @property
    def ran(self) -> list[str]:
        """Ids of the nodes that the last run ran."""
        return [event.node_id for event in self.events if isinstance(event, NodeStarted)]

    def output(self) -> torch.Tensor:
        """The picture that was written last."""
        path = max((self.root / "output").glob("*.png"))
        with Image.open(path) as image:
            return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


@pytest.fixture
def bench(tmp_path: Path, small_models: Path) -> Bench:
    """With the real nodes, and copies of the small models and pictures."""
    shutil.copytree(small_models, tmp_path / "models")
    shutil.copytree(small_models.parent / "input", tmp_path / "input")
    return Bench(tmp_path, registry())


def counting_nodes(calls: list[str]) -> NodeRegistry:
    """Nodes that note when they are called."""

    @node("Source", category="test")
    def source(name: Annotated[str, Text()], *, context: NodeContext) -> str:
        calls.append(name)
        return name

    @node("Join", category="test")
    def join(a: Annotated[str, Text()], b: Annotated[str, Text()] = "") -> tuple[str, int]:
        calls.append(f"({a}{b})")
        return f"({a}{b})", len(f"{a}{b}")

    @node("Show", category="test", output_node=True)
    def show(text: Annotated[str, Text()]) -> Shown:
        calls.append(f"show {text}")
        return Shown()

    @node("Fail", category="test")
    def fail(how: Annotated[str, Text()]) -> str:
        errors: Mapping[str, BaseException] = {
            "bug": ZeroDivisionError("division by zero"),
            "memory": MemoryError(),
            "known": UsoflowError("image_invalid", "x.png is odd.", remedy="Look at it."),
        }
        raise errors[how]

    members: list[AnyNode] = [source, join, show, fail]
    return NodeRegistry(members)


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def plain(tmp_path: Path, calls: list[str]) -> Bench:
    """With nodes that only count."""
    (tmp_path / "models").mkdir()
    return Bench(tmp_path, counting_nodes(calls))


def entry(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


DIAMOND = {
    "show": entry("Show", text=["top", 0]),
    "top": entry("Join", a=["left", 0], b=["right", 0]),
    "right": entry("Join", a=["source", 0], b="r"),
    "left": entry("Join", a=["source", 0], b="l"),
    "source": entry("Source", name="s"),
    "dead": entry("Source", name="never"),
}


class TestOrder:
    def test_each_node_that_is_needed_once_after_its_inputs(self, plain: Bench, calls: list[str]) -> None:
        plain.run(DIAMOND, "show")
        assert calls == ["s", "(sl)", "(sr)", "((sl)(sr))", "show ((sl)(sr))"]
        assert plain.ran == ["source", "left", "right", "top", "show"]

    def test_second_output_of_a_node(self, plain: Bench, calls: list[str]) -> None:
        plain.run({"j": entry("Join", a="xyz"), "show": entry("Show", text=["j", 1])}, "show")
        assert calls[-1] == "show 3"

    def test_lists_as_values(self, plain: Bench, calls: list[str]) -> None:
        plain.run({"show": entry("Show", text={"__value__": ["a", 0]})}, "show")
        assert calls == ["show ['a', 0]"]

    def test_inputs_that_the_node_does_not_have_are_not_given(self, plain: Bench, calls: list[str]) -> None:
        plain.run({"show": entry("Show", text="a", speed=3)}, "show")
        assert calls == ["show a"]

    @pytest.mark.parametrize("link", [["nobody", 0], ["self", 0], ["lost", 0]])
    def test_links_that_the_node_does_not_have_lead_nowhere(
        self, plain: Bench, calls: list[str], link: list[Any]
    ) -> None:
        prompt = {"self": entry("Show", text="a", other=link), "lost": entry("Fail", how="bug")}
        plain.run(prompt, "self")
        assert calls == ["show a"]

    def test_only_the_targets(self, plain: Bench, calls: list[str]) -> None:
        prompt = {name: entry("Show", text=name) for name in "abc"}
        result = plain.run(prompt, "c", "a")
        assert calls == ["show c", "show a"]
        assert set(result.shown) == {"a", "c"}

    def test_long_chains(self, plain: Bench, calls: list[str]) -> None:
        """Deeper than Python's recursion limit."""
        prompt = {"0": entry("Source", name="s")}
        prompt |= {str(i): entry("Join", a="x", b=[str(i - 1), 1] if i > 1 else "") for i in range(1, 3000)}
        prompt["show"] = entry("Show", text=["2999", 1])
        plain.run(prompt, "show")
        assert len(calls) == 3000

    def test_links_in_a_circle_are_an_error(self, plain: Bench) -> None:
        """Which validation does not let through."""
        prompt = {key: entry("Join", a=[origin, 0]) for key, origin in (("a", "b"), ("b", "c"), ("c", "b"))}
        with pytest.raises(UsoflowError, match="circle through node b") as caught:
            plain.run(prompt, "a")
        assert caught.value.code == "prompt_invalid"

    def test_in_order_stops_at_what_is_known(self) -> None:
        prompt = Prompt.parse(DIAMOND)
        assert list(in_order(prompt, ["show"], stop_at={"left": ()})) == [
            "left",
            "source",
            "right",
            "top",
            "show",
        ]
        assert list(in_order(prompt, ["top"], stop_at={"top": ()})) == ["top"]


class TestLinkedValues:
    """What validation could not see: it is checked when it is there."""

    PICTURE: Mapping[str, Any] = {"width": 8, "height": 8, "batch_size": 1, "color": 0}

    @pytest.mark.parametrize("name", ["width", "batch_size"])
    def test_a_value_outside_the_range(self, bench: Bench, name: str) -> None:
        prompt = {
            "none": entry("PrimitiveInt", value=0),
            "picture": entry("EmptyImage", **{**self.PICTURE, name: ["none", 0]}),
            "show": entry("PreviewImage", images=["picture", 0]),
        }
        with pytest.raises(NodeError, match=f"smaller than min of 1: {name}.*from node none") as caught:
            bench.run(prompt, "show")
        assert (caught.value.code, caught.value.node_id) == ("prompt_invalid", "picture")
        assert "node none" in caught.value.remedy

    def test_a_value_is_converted_as_one_that_is_given_directly(self, bench: Bench, calls: list[str]) -> None:
        bench.executor.registry = NodeRegistry([*registry().values(), *counting_nodes(calls).values()])
        prompt = {
            "text": entry("Join", a="xyz"),
            "name": entry("Source", name="12"),
            "picture": entry("EmptyImage", **{**self.PICTURE, "width": ["text", 1], "height": ["name", 0]}),
            "size": entry("GetImageSize", image=["picture", 0]),
            "show": entry("Show", text=["size", 1]),
        }
        bench.run(prompt, "show")
        assert calls[-1] == "show 12"

    def test_a_name_that_is_none_of_the_options(self, bench: Bench) -> None:
        prompt = {
            "name": entry("PrimitiveString", value="fuzzy"),
            "picture": entry("EmptyImage", **self.PICTURE),
            "scale": entry("ImageScaleBy", image=["picture", 0], upscale_method=["name", 0], scale_by=2.0),
            "show": entry("PreviewImage", images=["scale", 0]),
        }
        with pytest.raises(NodeError, match="upscale_method: 'fuzzy' not in") as caught:
            bench.run(prompt, "show")
        assert caught.value.code == "prompt_invalid"


class TestCache:
    def test_nothing_runs_twice(self, plain: Bench, calls: list[str]) -> None:
        first = plain.run(DIAMOND, "show")
        calls.clear()
        second = plain.run(DIAMOND, "show")
        assert calls == []
        assert second.shown == first.shown
        assert second.cached == ["source", "left", "right", "top", "show"]
        assert plain.events == [NodesCached(tuple(second.cached), first.shown)]

    def test_every_node_that_is_not_run_is_told(self, plain: Bench) -> None:
        """Also what only known nodes need, which nobody looks at any more."""
        plain.run(DIAMOND, "show")
        result = plain.run(small.with_inputs(DIAMOND, "show", text=["top", 1]), "show")
        assert plain.ran == ["show"]
        assert plain.events[0] == NodesCached(("source", "left", "right", "top"), {})
        assert result.cached == ["source", "left", "right", "top"]

    @pytest.mark.parametrize("way", ["removed", "changed", "another's"])
    def test_a_picture_that_is_not_there_as_it_was_is_written_again(self, bench: Bench, way: str) -> None:
        bench.run(small.text_to_image())
        before = bench.output()
        for path in (bench.root / "output").glob("*.png"):
            if way == "changed":
                path.write_bytes(path.read_bytes() + b"\0")
                continue
            path.unlink()
            if way == "another's":
                Image.new("RGB", (8, 8)).save(path)
        bench.run(small.text_to_image())
        assert bench.ran == ["save"]
        assert torch.equal(bench.output(), before)

    def test_what_follows_a_change_runs_again(self, plain: Bench, calls: list[str]) -> None:
        plain.run(DIAMOND, "show")
        result = plain.run(small.with_inputs(DIAMOND, "right", b="R"), "show")
        assert plain.ran == ["right", "top", "show"]
        assert set(result.cached) == {"source", "left"}
        assert calls[-1] == "show ((sl)(sR))"

    def test_ids_do_not_matter(self, plain: Bench, calls: list[str]) -> None:
        plain.run(DIAMOND, "show")
        text = str(DIAMOND).replace("'source'", "'57:1'").replace("'left'", "'3'")
        calls.clear()
        plain.run(eval(text), "show")
        assert calls == []

    def test_values_of_different_types_differ(self, plain: Bench, calls: list[str]) -> None:
        for value in ("1", 1, 1.0, True, ["x", "y"]):
            plain.run({"show": entry("Show", text=value)}, "show")
        assert len(calls) == 5

    def test_what_the_last_run_did_not_use_is_forgotten(self, plain: Bench, calls: list[str]) -> None:
        plain.run(DIAMOND, "show")
        plain.run({key: node for key, node in DIAMOND.items() if key in ("left", "source")}, "left")
        calls.clear()
        plain.run(DIAMOND, "show")
        assert calls == ["(sr)", "((sl)(sr))", "show ((sl)(sr))"]

    def test_what_a_run_was_not_asked_for_is_kept(self, plain: Bench, calls: list[str]) -> None:
        plain.run(DIAMOND, "show")
        plain.run(DIAMOND, "left")  # as the editor's "run to here"
        calls.clear()
        plain.run(DIAMOND, "show")
        assert calls == []

    def test_a_run_that_fails_keeps_what_it_computed_and_nothing_else(
        self, plain: Bench, calls: list[str]
    ) -> None:
        failing = {
            "show": entry("Show", text=["join", 0]),
            "join": entry("Join", a=["source", 0], b=["fail", 0]),
            "source": entry("Source", name="s"),
            "fail": entry("Fail", how="bug"),
        }
        for _ in range(3):
            plain.run(DIAMOND, "left")
            with pytest.raises(NodeError):
                plain.run(failing, "show")
            with pytest.raises(NodeError):
                plain.run(small.with_inputs(failing, "source", name="other"), "show")
        assert calls == ["s", "(sl)", "other"] * 3

    def test_equal_nodes_run_once(self, plain: Bench, calls: list[str]) -> None:
        twins = DIAMOND | {
            "right": entry("Join", a=["other", 0], b="x"),
            "left": entry("Join", a=["source", 0], b="x"),
            "other": entry("Source", name="s"),
        }
        result = plain.run(twins, "show")
        assert calls == ["s", "(sx)", "((sx)(sx))", "show ((sx)(sx))"]
        assert result.cached == ["other", "right"]
        assert plain.events[0] == NodesCached(("other", "right"), {})

    def test_equal_output_nodes_each_show_their_own(self, bench: Bench) -> None:
        prompt = {"picture": entry("EmptyImage", width=8, height=8, batch_size=1, color=0)}
        prompt |= {key: entry("SaveImage", images=["picture", 0], filename_prefix="x") for key in "ab"}
        for _ in range(2):
            shown = bench.run(prompt, "a", "b").shown
            names = [shown[key].images[0].filename for key in "ab"]
            assert names == ["x_00001_.png", "x_00002_.png"]
        assert bench.ran == []

    def test_outputs_of_one_node_differ(self, plain: Bench, calls: list[str]) -> None:
        prompt = {
            "first": entry("Show", text=["join", 0]),
            "again": entry("Join", a=["join", 0]),
            "other": entry("Join", a=["join", 1]),
            "join": entry("Join", a="x", b="y"),
            "show again": entry("Show", text=["again", 0]),
            "show other": entry("Show", text=["other", 0]),
        }
        plain.run(prompt, "show again", "show other")
        assert {"((xy))", "(2)"} < set(calls)


class TestPromptOfTheRun:
    """What nodes are lent of it: as JSON, made once."""

    def test_it_is_made_once_for_all_nodes(self, plain: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        made, to_json = [], Prompt.to_json
        monkeypatch.setattr(Prompt, "to_json", lambda prompt: made.append(1) or to_json(prompt))
        prompt = {str(n): entry("Source", name=str(n)) for n in range(20)}
        plain.run(prompt, *prompt)
        assert len(plain.ran) == 20
        assert len(made) == 1

    def test_a_custom_node_may_change_its_own(self, bench: Bench) -> None:
        class Careless:
            RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

            @classmethod
            def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
                return {"required": {}, "hidden": {"prompt": "PROMPT"}}

            def run(self, prompt: dict[str, Any]) -> tuple[()]:
                prompt["save"]["inputs"].clear()
                del prompt["picture"]
                return ()

        careless = adapt("Careless", Careless, module="careless")
        bench.executor.registry = NodeRegistry([*registry().values(), careless])
        prompt = {
            "careless": entry("Careless"),
            "picture": entry("EmptyImage", width=8, height=8, batch_size=1, color=0),
            "save": entry("SaveImage", images=["picture", 0], filename_prefix="x"),
        }
        (saved,) = bench.run(prompt, "careless", "save").shown["save"].images
        assert bench.ran == ["careless", "picture", "save"]
        data = (bench.root / "output" / saved.filename).read_bytes()
        assert json.loads(metadata.read(data)["prompt"]) == prompt


class TestFileNames:
    def test_the_date_is_that_of_the_run(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a prompt that no editor has sent; it is embedded as it was given."""
        given = "%date:yyyy%/%width%"
        prompt = {
            "picture": entry("EmptyImage", width=8, height=8, batch_size=1, color=0),
            "save": entry("SaveImage", images=["picture", 0], filename_prefix=given),
        }
        for year in (2031, 2032):
            clock = SimpleNamespace(now=lambda year=year: datetime(year, 3, 4))
            monkeypatch.setattr("usoflow.execution.executor.datetime", clock)
            (saved,) = bench.run(prompt).shown["save"].images
            assert (saved.subfolder, saved.filename) == (str(year), "8_00001_.png")
            data = (bench.root / "output" / saved.subfolder / saved.filename).read_bytes()
            embedded = json.loads(metadata.read(data)["prompt"])
            assert embedded["save"]["inputs"]["filename_prefix"] == given


class TestFiles:
    """The same prompt again, while files change under their names."""

    def test_unchanged(self, bench: Bench) -> None:
        prompt = small.with_style(small.subject())
        bench.run(prompt)
        assert len(bench.ran) == len(prompt)
        bench.run(prompt)
        assert bench.ran == []

    def test_seed_runs_the_sampler_only(self, bench: Bench) -> None:
        prompt = small.with_style(small.subject())
        bench.run(prompt)
        before = bench.output()
        bench.run(small.with_inputs(prompt, "sampler", seed=2))
        assert bench.ran == ["sampler", "decode", "save"]
        assert not torch.equal(before, bench.output())

    def test_picture_with_other_content(self, bench: Bench) -> None:
        prompt = small.with_style(small.subject())
        bench.run(prompt)
        before = bench.output()
        Image.new("RGB", (80, 48), (255, 0, 0)).save(bench.root / "input/subject.png")
        bench.run(prompt)
        assert "picture" in bench.ran
        assert "sampler" in bench.ran
        assert {"loader", "text", "style picture", "vision"}.isdisjoint(bench.ran)
        assert not torch.equal(before, bench.output())

    def test_touched_picture_is_the_same_picture(self, bench: Bench) -> None:
        bench.run(small.subject())
        (bench.root / "input/subject.png").touch()
        bench.run(small.subject())
        assert bench.ran == []

    def test_model_file_with_other_content(self, bench: Bench) -> None:
        prompt = small.subject()
        bench.run(prompt)
        before = bench.output()
        path = bench.root / "models/loras/uso-flux1-dit-lora-v1.safetensors"
        change(path, lambda name, tensor: tensor * 3)
        bench.run(prompt)
        assert bench.ran == ["lora", "sampler", "decode", "save"]
        assert not torch.equal(before, bench.output())

    def test_checkpoint_with_other_content(self, bench: Bench) -> None:
        bench.run(small.text_to_image())
        before = bench.output()
        change(checkpoint(bench), lambda name, tensor: tensor * 1.1)
        bench.run(small.text_to_image())
        assert set(bench.ran) == set(small.text_to_image()) - {"empty"}
        assert not torch.equal(before, bench.output())

    def test_removed_model(self, bench: Bench) -> None:
        bench.run(small.subject())
        (bench.root / "models/loras/uso-flux1-dit-lora-v1.safetensors").unlink()
        with pytest.raises(NodeError) as caught:
            bench.run(small.subject())
        assert caught.value.code == "model_missing"
        assert "huggingface.co" in caught.value.remedy


def checkpoint(bench: Bench) -> Path:
    return bench.root / "models/checkpoints/flux1-dev-fp8.safetensors"


def change(path: Path, new: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Rewrite a model file, tensor by tensor."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
    assert metadata is None or set(metadata) == {CONFIG_KEY}
    tensors = {name: new(name, tensor).contiguous() for name, tensor in load_file(path).items()}
    path.unlink()  # the old file may still be mapped
    save_file(tensors, path, metadata=metadata)


class TestErrors:
    @pytest.mark.parametrize(
        ("how", "code", "words"),
        [
            ("bug", "node_failed", "ZeroDivisionError: division by zero"),
            ("memory", "out_of_memory", "Memory ran out"),
            ("known", "image_invalid", "x.png is odd."),
        ],
    )
    def test_errors_name_the_node(self, plain: Bench, how: str, code: str, words: str) -> None:
        prompt = {"7": entry("Fail", how=how), "show": entry("Show", text=["7", 0])}
        with pytest.raises(NodeError) as caught:
            plain.run(prompt, "show")
        assert caught.value.code == code
        assert caught.value.detail.startswith("Fail (node 7): ")
        assert words in caught.value.detail
        assert (caught.value.node_id, caught.value.class_type) == ("7", "Fail")
        assert how != "known" or caught.value.remedy == "Look at it."

    @pytest.mark.parametrize(
        ("tensor", "node_id", "stage"),
        [
            ("model.diffusion_model.double_blocks.1.img_mlp.0.weight", "sampler", "step 1 of 2"),
            ("text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight", "text", "T5"),
            ("text_encoders.clip_l.transformer.text_model.final_layer_norm.weight", "text", "CLIP"),
            ("vae.encoder.conv_in.weight", "encode", "VAE encoding"),
            ("vae.decoder.conv_in.weight", "decode", "VAE decoding"),
        ],
    )
    def test_values_that_are_not_finite(self, bench: Bench, tensor: str, node_id: str, stage: str) -> None:
        found = []

        def damage(name: str, values: torch.Tensor) -> torch.Tensor:
            found.append(name)
            return values * float("nan") if name == tensor else values

        change(checkpoint(bench), damage)
        assert tensor in found
        with pytest.raises(NodeError) as caught:
            bench.run(small.subject())
        assert caught.value.code == "non_finite"
        assert caught.value.node_id == node_id
        assert stage in caught.value.detail
        assert not (bench.root / "output").exists()

    @pytest.mark.parametrize(
        ("file", "node_id"),
        [("loras/*", "sampler"), ("model_patches/*", "sampler"), ("clip_vision/*", "vision")],
    )
    def test_adapters_that_are_not_finite(self, bench: Bench, file: str, node_id: str) -> None:
        (path,) = (bench.root / "models").glob(file)
        change(path, lambda name, values: values * float("inf"))
        with pytest.raises(NodeError) as caught:
            bench.run(small.with_style(small.subject()))
        assert (caught.value.code, caught.value.node_id) == ("non_finite", node_id)

    def test_results_that_are_not_finite(self, bench: Bench) -> None:
        """Also from a node that does not look itself."""
        prompt = small.text_to_image()
        prompt["decode"] = {"class_type": "Infinite", "inputs": {}}

        @node("Infinite", category="test")
        def infinite(value: Annotated[int, Int()] = 0) -> Annotated[Any, Text()]:
            return {"samples": [(torch.ones(1), {"pooled": torch.tensor([1.0, float("inf")])})]}

        bench.executor.registry = NodeRegistry([*registry().values(), infinite])
        with pytest.raises(NodeError) as caught:
            bench.run(prompt)
        assert (caught.value.code, caught.value.node_id) == ("non_finite", "decode")

    @pytest.mark.parametrize("times", [1, 2])
    def test_memory_that_runs_out_once_more_with_half(
        self,
        bench: Bench,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        times: int,
    ) -> None:
        """The second time with half of the memory for weights; the third not at all."""
        library, forward = bench.executor.library, Flux.forward
        library.plan(replace(library.placement, budget=10**9))
        budgets = []

        def short_of_memory(*arguments: Any) -> Any:
            budgets.append(library.placement.budget)
            if len(budgets) <= times:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(*arguments)

        monkeypatch.setattr(Flux, "forward", short_of_memory)
        if times == 1:
            assert bench.run(small.text_to_image()).shown
        else:
            with pytest.raises(NodeError) as caught:
                bench.run(small.text_to_image())
            assert (caught.value.code, caught.value.node_id) == ("out_of_memory", "sampler")
        assert budgets[:2] == [10**9, 5 * 10**8]
        assert library.placement.budget == (5 * 10**8 if times == 1 else 10**9)
        assert (
            caplog.messages.count(
                "Memory ran out: once more, with at most 500 MB for the transformer's weights."
            )
            == 1
        )

    @pytest.mark.parametrize("with_context", [False, True])
    def test_memory_that_runs_out_where_no_models_are_used(self, bench: Bench, with_context: bool) -> None:
        """They make room for once; the plan stays."""
        library, asked = bench.executor.library, []
        bench.run(small.text_to_image())
        assert library.holds_models
        before = library.placement

        def work() -> str:
            asked.append((library.holds_models, library.placement is before))
            if len(asked) == 1:
                raise torch.OutOfMemoryError("not enough memory")
            return "done"

        @node("Short", category="test", output_node=True)
        def short(value: Annotated[int, Int()] = 0) -> Annotated[Any, Text()]:
            return work()

        @node("Short", category="test", output_node=True)
        def lent(value: Annotated[int, Int()] = 0, *, context: NodeContext) -> Annotated[Any, Text()]:
            return work()

        bench.executor.registry = NodeRegistry([*registry().values(), lent if with_context else short])
        bench.run({"short": {"class_type": "Short", "inputs": {}}}, "short")
        assert asked == [(True, True), (False, True)]
        assert library.placement is before

    @pytest.mark.parametrize("helps", [True, False])
    def test_memory_that_runs_out_beside_the_transformer(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, helps: bool
    ) -> None:
        """A node that has no use for it is run again with less; then all is as before."""
        library, decode, budgets = bench.executor.library, AutoEncoder.decode, []
        before = replace(library.placement, budget=10**9)
        library.plan(before)

        def short_of_memory(*arguments: Any, **options: Any) -> Any:
            budgets.append(library.placement.budget)
            if len(budgets) == 1:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            if not helps:
                raise UsoflowError("cancelled", "enough")
            return decode(*arguments, **options)

        monkeypatch.setattr(AutoEncoder, "decode", short_of_memory)
        if helps:
            assert bench.run(small.text_to_image()).shown
        else:
            with pytest.raises(UsoflowError, match="enough"):
                bench.run(small.text_to_image())
        assert budgets == [10**9, 5 * 10**8]
        assert library.placement is before

    def test_memory_that_runs_out(self, tmp_path: Path, small_models: Path) -> None:
        """An address space limit (setrlimit(2)) in a process of its own."""
        code = f"""
            import resource
            from pathlib import Path
            import small
            from usoflow.errors import UsoflowError
            from usoflow.execution.executor import Executor
            from usoflow.models.library import ModelLibrary
            from usoflow.models.placement import Placement
            from usoflow.nodes import registry
            from usoflow.settings import find_folders
            from usoflow.workflow.prompt import Prompt
            large = dict(class_type="EmptyImage", inputs=dict(width=8192, height=8192))
            prompt = small.text_to_image() | dict(decode=large)
            folders = find_folders(models=Path({str(small_models)!r}), output=Path({str(tmp_path)!r}))
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 400_000_000
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            executor = Executor(registry(), ModelLibrary(Placement.choose("cpu", "fp32")))
            try:
                executor.run(Prompt.parse(prompt), ["save"], folders)
            except UsoflowError as error:
                print(error.code, "|", error.detail)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.stderr == ""
        assert done.stdout.startswith("out_of_memory | ")
        assert "(node " in done.stdout


class TestProgress:
    def test_events_in_order(self, bench: Bench) -> None:
        result = bench.run(small.text_to_image())
        started = [event.node_id for event in bench.events if isinstance(event, NodeStarted)]
        finished = [event for event in bench.events if isinstance(event, NodeFinished)]
        assert isinstance(bench.events[0], NodesCached)
        assert [event.node_id for event in finished] == started
        assert list(result.finished) == finished
        steps = [event for event in bench.events if isinstance(event, NodeProgress)]
        assert steps == [NodeProgress("sampler", 1, 2), NodeProgress("sampler", 2, 2)]
        position = [bench.events.index(event) for event in steps]
        begin = bench.events.index(NodeStarted("sampler", "KSampler"))
        end = next(
            i for i, e in enumerate(bench.events) if isinstance(e, NodeFinished) and e.node_id == "sampler"
        )
        assert begin < position[0] < position[1] < end

    def test_timings_and_memory(self, bench: Bench) -> None:
        result = bench.run(small.text_to_image())
        total = sum(record.seconds for record in result.finished)
        assert 0 < total <= result.seconds
        assert max(result.finished, key=lambda record: record.seconds).class_type in (
            "KSampler",
            "CLIPTextEncode",
            "VAEDecode",
        )
        assert all(record.peak_bytes > 10_000_000 for record in result.finished)

    def test_what_was_saved(self, bench: Bench) -> None:
        result = bench.run(small.with_inputs(small.text_to_image(), "empty", batch_size=2))
        names = [image.filename for image in result.shown["save"].images]
        assert names == ["out_00001_.png", "out_00002_.png"]
        (record,) = [record for record in result.finished if record.node_id == "save"]
        assert record.shown == result.shown["save"]


class TestCancellation:
    def test_within_one_step(self, bench: Bench) -> None:
        cancellation = Cancellation()

        def stop(event: Event) -> None:
            if event == NodeProgress("sampler", 2, 50):
                cancellation.set()

        prompt = small.with_inputs(small.text_to_image(), "sampler", steps=50)
        with pytest.raises(UsoflowError) as caught:
            bench.run(prompt, listen=stop, cancellation=cancellation)
        assert caught.value.code == "cancelled"
        assert caught.value.exit_code == 130
        assert bench.events[-1] == NodeProgress("sampler", 2, 50)
        assert not (bench.root / "output").exists()

    def test_between_nodes(self, plain: Bench, calls: list[str]) -> None:
        cancellation = Cancellation()

        def stop(event: Event) -> None:
            if isinstance(event, NodeFinished) and event.node_id == "left":
                cancellation.set()

        with pytest.raises(UsoflowError) as caught:
            plain.run(DIAMOND, "show", listen=stop, cancellation=cancellation)
        assert caught.value.code == "cancelled"
        assert calls == ["s", "(sl)"]

    def test_runs_on_from_there(self, bench: Bench) -> None:
        cancellation = Cancellation()

        def stop(event: Event) -> None:
            if isinstance(event, NodeProgress):
                cancellation.set()

        with pytest.raises(UsoflowError):
            bench.run(small.subject(), listen=stop, cancellation=cancellation)
        bench.run(small.subject())
        assert bench.ran == ["sampler", "decode", "save"]

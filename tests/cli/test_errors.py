"""Every mistake from a shell: an exit code, what is wrong, what to do; never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import small
from shell import Done, usoflow

CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"
LORA = "loras/uso-flux1-dit-lora-v1.safetensors"
PROJECTOR = "model_patches/uso-flux1-projector-v1.safetensors"
TOWER = "clip_vision/sigclip_vision_patch14_384.safetensors"
DIT = "model.diffusion_model."


class Desk:
    """Folders of models and pictures that a test may damage."""

    def __init__(self, root: Path, small_models: Path) -> None:
        self.root, self.models = root, root / "models"
        shutil.copytree(small_models, self.models)
        shutil.copytree(small_models.parent / "input", root / "input")

    def run(
        self, prompt: small.Prompt | Path | str, *options: str | Path, models: Path | None = None
    ) -> Done:
        """`usoflow run` with the folders of this desk."""
        if isinstance(prompt, dict):
            (self.root / "prompt.json").write_text(json.dumps(prompt))
            prompt = self.root / "prompt.json"
        folders = ("--models", models or self.models, "--output", self.root / "output")
        return usoflow("run", prompt, *folders, "--device", "cpu", "--dtype", "fp32", *options)

    def change(self, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Rewrite a model file after `change` has changed its tensors."""
        path = self.models / file
        with safe_open(path, framework="pt") as reader:
            metadata = reader.metadata()
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)

    def header(self, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Rewrite the header of a model file and leave its data."""
        path = self.models / file
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.fixture
def desk(tmp_path: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, small_models)


def check(done: Done, code: int, *words: str) -> None:
    """It failed with this exit code, one error that has these words, and a remedy."""
    assert done.code == code, done
    assert "Traceback" not in done.err
    assert done.out == ""
    first, *rest = done.err.strip().splitlines()
    assert first.startswith("error: ")
    assert done.err.count("error: ") == 1
    assert rest, "no remedy"
    for word in words:
        assert word in done.err


@pytest.mark.parametrize(
    ("option", "code", "remedy"),
    [
        ("--models", 2, "Check the path."),
        ("--subject", 5, "Check the path."),
        ("--output", 2, "choose another with --output"),
        ("--save-workflow", 2, "Check the folder"),
    ],
)
def test_what_the_system_does_not_open(desk: Desk, option: str, code: int, remedy: str) -> None:
    """Too long a name stands for all that the system refuses: it lets whoever runs tests read any folder."""
    check(usoflow("generate", "a cat", "--models", desk.models, option, "x" * 300), code, "x" * 300, remedy)


class TestWorkflow:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"{", "not JSON"),
            (b"", "not JSON"),
            (b"[]", "neither a workflow nor a prompt"),
            (b"{}", "neither a workflow nor a prompt"),
            (b"\xff\xfe\x00", "not JSON"),
            (b"[" * 100_000, "nested"),
            (b'{"nodes": 5, "links": []}', ""),
            (b'{"1": {"inputs": {}}}', "class_type"),
        ],
    )
    def test_not_a_workflow(self, desk: Desk, content: bytes, words: str) -> None:
        (desk.root / "bad.json").write_bytes(content)
        check(desk.run(desk.root / "bad.json"), 3, "bad.json", words)

    def test_picture_without_workflow(self, desk: Desk) -> None:
        check(desk.run(desk.root / "input/subject.png"), 3, "subject.png", "no workflow")

    def test_missing_file(self, desk: Desk) -> None:
        check(desk.run(desk.root / "none.json"), 2, "none.json")

    def test_folder(self, desk: Desk) -> None:
        check(desk.run(desk.root), 2, str(desk.root))

    def test_unknown_template(self, desk: Desk) -> None:
        check(desk.run("template:nothing"), 2, "nothing", "template:flux1_dev_uso_reference_image_gen")

    def test_unknown_node(self, desk: Desk) -> None:
        magic = {"x": {"class_type": "MagicNode", "inputs": {"a": ["y", 0]}}}
        prompt = small.with_inputs(small.text_to_image() | magic, "save", images=["x", 0])
        check(desk.run(prompt), 3, "MagicNode", "x", "Bypass or replace")
        check(desk.run(prompt | {"y": {"class_type": "Other", "inputs": {}}}), 3, "MagicNode", "Other")

    def test_unknown_node_where_no_output_is_known(self, desk: Desk) -> None:
        prompt = small.text_to_image()
        prompt["save"]["class_type"] = "MagicSave"
        check(desk.run(prompt), 3, "MagicSave", "Bypass or replace")

    def test_a_link_that_leads_nowhere(self, desk: Desk) -> None:
        done = desk.run(small.with_inputs(small.text_to_image(), "save", images=["99", 0]))
        check(done, 3, "SaveImage (node save): images is linked to node '99', which is not there")
        done = desk.run(small.with_inputs(small.text_to_image(), "save", images=["decode", 3]))
        check(done, 3, "images is linked to output 3 of node decode, which has 1")

    def test_nothing_to_do(self, desk: Desk) -> None:
        prompt = {key: node for key, node in small.text_to_image().items() if key != "save"}
        check(desk.run(prompt), 3, "no outputs")

    @pytest.mark.parametrize(
        ("node", "changes", "words"),
        [
            ("sampler", {"steps": 0}, "steps"),
            ("sampler", {"steps": 10**6}, "bigger than max of 10000"),
            ("sampler", {"cfg": "strong"}, "FLOAT"),
            ("sampler", {"sampler_name": "best"}, "sampler_name"),
            ("sampler", {"seed": -1}, "smaller than min of 0"),
            ("sampler", {"denoise": float("nan")}, "denoise"),
            ("sampler", {"model": ["loader", 1]}, "received_type(CLIP) mismatch input_type(MODEL)"),
            ("sampler", {"model": ["loader", 7]}, "model is linked to output 7 of node loader, which has 3"),
            ("sampler", {"model": ["nowhere", 0]}, "nowhere"),
            ("sampler", {"model": "loader"}, "model"),
            ("empty", {"width": 17000}, "bigger than max of 16384"),
            ("text", {"text": ["a", "b", "c"]}, "text"),
            ("sampler", {"positive": ["cycle", 0]}, "ycle"),
        ],
    )
    def test_invalid_inputs(self, desk: Desk, node: str, changes: dict[str, Any], words: str) -> None:
        prompt = small.text_to_image() | {
            "cycle": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["back", 0], "guidance": 3.5}},
            "back": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["cycle", 0]}},
        }
        check(desk.run(small.with_inputs(prompt, node, **changes)), 3, words)

    @pytest.mark.parametrize(
        ("name", "advice"),
        [("model", "muted (Ctrl+M)"), ("seed", "--set sampler.seed=VALUE"), ("positive", "muted (Ctrl+M)")],
    )
    def test_missing_input(self, desk: Desk, name: str, advice: str) -> None:
        """A value can be given; what only a link can bring comes from a node that is muted, mostly."""
        done = desk.run(small.without(small.text_to_image(), "sampler", name))
        check(done, 3, "KSampler (node sampler)", "Required input is missing", name, advice)

    def test_every_mistake_is_named_at_once(self, desk: Desk) -> None:
        prompt = small.with_inputs(small.text_to_image(), "sampler", steps=0, cfg=-1)
        check(
            desk.run(small.with_inputs(prompt, "empty", width=1)), 3, "KSampler", "EmptySD3LatentImage", "cfg"
        )


class TestOptions:
    @pytest.mark.parametrize(
        "assignment",
        ["text", "text.text", "=", "nobody.text=a", "text.colour=red", ".=", "KSampler=5", "text.=x"],
    )
    def test_set(self, desk: Desk, assignment: str) -> None:
        check(desk.run(small.text_to_image(), "--set", assignment), 2, "--set NODE.INPUT=VALUE")

    def test_set_of_a_name_that_two_nodes_have(self, desk: Desk) -> None:
        prompt = small.with_style(small.subject())
        check(desk.run(prompt, "--set", "LoadImage.image=x"), 2, "picture", "style picture")

    def test_set_to_a_value_out_of_range(self, desk: Desk) -> None:
        check(desk.run(small.text_to_image(), "--set", "sampler.steps=-5"), 3, "smaller than min")

    @pytest.mark.parametrize("option", ["picture", "nobody=PICTURE", "text=PICTURE"])
    def test_image_option(self, desk: Desk, option: str) -> None:
        option = option.replace("PICTURE", str(desk.root / "input/style.png"))
        check(desk.run(small.subject(), "--image", option), 2)

    def test_image_that_is_not_there(self, desk: Desk) -> None:
        check(desk.run(small.subject(), "--image", "picture=none.png"), 5, "none.png")

    @pytest.mark.parametrize(
        "options",
        [
            ("--seed", "-1"),
            ("--seed", "x"),
            ("--seed", str(2**64)),
            ("--device", "tpu"),
            ("--dtype", "int4"),
            ("--vram", "eight"),
            ("--vram", "8"),
            ("-x",),
        ],
    )
    def test_options_that_there_are_not(self, desk: Desk, options: tuple[str, ...]) -> None:
        done = desk.run(small.text_to_image(), *options)
        assert done.code == 2
        assert "Traceback" not in done.err
        assert options[0] in done.err

    def test_device_that_is_not_there(self, desk: Desk) -> None:
        device = next(d for d in ("cuda", "mps") if not getattr(torch, d).is_available())
        check(desk.run(small.text_to_image(), "--device", device), 2, device, "--device auto")

    def test_models_folder_that_is_not_there(self, desk: Desk) -> None:
        check(desk.run(small.text_to_image(), models=desk.root / "none"), 2, str(desk.root / "none"))

    def test_input_folder_that_is_not_there(self, desk: Desk) -> None:
        check(desk.run(small.subject(), "--input", desk.root / "none"), 2, str(desk.root / "none"))

    @pytest.mark.parametrize("option", ["--models", "--input", "--output", "--custom-nodes"])
    def test_a_path_that_is_empty(self, desk: Desk, option: str) -> None:
        """As of a shell's variable that is not set; it would be the current folder."""
        done = desk.run(small.text_to_image(), option, "")
        assert done.code == 2
        assert option in done.err
        assert "the path is empty" in done.err

    def test_standard_output_that_is_full(self) -> None:
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "usoflow", "nodes"], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: Standard output: No space left on device.")

    def test_broken_extra_model_paths(self, desk: Desk) -> None:
        (desk.root / "extra_model_paths.yaml").write_text("a: [")
        check(desk.run(small.text_to_image()), 2, "extra_model_paths.yaml")

    def test_unknown_node_name(self) -> None:
        check(usoflow("nodes", "Magic"), 2, "Magic", "usoflow nodes")


class TestJson:
    @pytest.mark.parametrize("options", [("--seed", "x"), ("--nothing",), ("one", "word", "too", "many")])
    def test_a_command_line_that_is_not_understood_is_one_object(self, options: tuple[str, ...]) -> None:
        done = usoflow("run", "x.json", *options, "--json")
        assert done.code == 2
        assert json.loads(done.out)["error"]["code"] == "command_invalid"
        assert json.loads(done.out)["error"]["detail"]
        assert done.err == ""

    def test_error_is_one_object(self, desk: Desk) -> None:
        done = desk.run(small.text_to_image(), "--json", models=desk.root / "none")
        assert done.code == 2
        record = json.loads(done.out)
        assert set(record) == {"error"}
        assert record["error"]["code"] == "file_not_found"
        assert str(desk.root / "none") in record["error"]["detail"]
        assert record["error"]["remedy"]

    def test_error_in_a_node(self, desk: Desk) -> None:
        (desk.root / "input/subject.png").write_text("no picture")
        done = desk.run(small.subject(), "--json")
        assert done.code == 5
        assert json.loads(done.out)["error"]["code"] == "image_invalid"


class TestModels:
    @pytest.mark.parametrize("file", [CHECKPOINT, LORA, PROJECTOR, TOWER])
    def test_missing(self, desk: Desk, file: str) -> None:
        """Folder, link, size and licence."""
        (desk.models / file).unlink()
        folder, name = file.split("/")
        done = desk.run(small.with_style(small.subject()))
        check(
            done,
            4,
            name,
            "https://huggingface.co/",
            "B",
            "licen" if folder == "checkpoints" else "Apache-2.0",
        )
        assert str(desk.models / folder) in done.err

    def test_missing_but_here_under_another_name(self, desk: Desk) -> None:
        """Named, not silently taken."""
        (desk.models / LORA).rename(desk.models / "loras/dit_lora.safetensors")
        check(desk.run(small.subject()), 4, "You have dit_lora.safetensors in loras")
        assert not (desk.root / "output").exists()
        assert (
            desk.run(small.with_inputs(small.subject(), "lora", lora_name="dit_lora.safetensors")).code == 0
        )

    @pytest.mark.parametrize("file", [CHECKPOINT, LORA, PROJECTOR, TOWER])
    @pytest.mark.parametrize("kept", [0, 5, 9, 500, -1, 0.7], ids=str)
    def test_truncated(self, desk: Desk, file: str, kept: float) -> None:
        data = (desk.models / file).read_bytes()
        kept = int(kept * len(data)) if isinstance(kept, float) else kept
        (desk.models / file).write_bytes(data[:kept])
        check(desk.run(small.with_style(small.subject())), 4, Path(file).name, "download")

    @pytest.mark.parametrize(
        "change",
        [
            lambda header: first(header).update(data_offsets=[0, 10**12]),
            lambda header: first(header).update(data_offsets=[-8, 8]),
            lambda header: first(header).update(data_offsets=[8, 0]),
            lambda header: first(header).update(data_offsets="all"),
            lambda header: first(header).update(shape=[10**6, 10**6]),
            lambda header: first(header).update(shape=[-1, -4]),
            lambda header: first(header).update(shape=[[2], 2]),
            lambda header: first(header).update(shape=None),
            lambda header: first(header).update(dtype="F8_E9"),
            lambda header: first(header).update(dtype=["F16"]),
            lambda header: first(header).pop("dtype"),
            lambda header: header.update({next(iter(header)): 5}),
            lambda header: header.update(__metadata__=5),
            lambda header: header.update(__metadata__={"usoflow.config": "{"}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"clip_l": 7}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"clip_l": {"heads": "two"}}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"clip_l": {"heads": 0}}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"clip_l": {"heads": 5}}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"t5": {"min_length": -7}}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"vae": {"groups": 7}}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"flux": {"axes": [1]}}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"flux": {"axes": "abc"}}'}),
            lambda header: header.update(__metadata__={"usoflow.config": '{"flux": {"shift": "x"}}'}),
        ],
    )
    def test_lying_header(self, desk: Desk, change: Callable[[dict[str, Any]], Any]) -> None:
        desk.header(CHECKPOINT, change)
        check(desk.run(small.text_to_image()), 4, "flux1-dev-fp8.safetensors")

    @pytest.mark.parametrize("length", [2**63, 10**8 + 1, 10**8, 2])
    def test_lying_header_length(self, desk: Desk, length: int) -> None:
        data = (desk.models / CHECKPOINT).read_bytes()
        (desk.models / CHECKPOINT).write_bytes(struct.pack("<Q", length) + data[8:])
        check(desk.run(small.text_to_image()), 4, "flux1-dev-fp8.safetensors")

    def test_overlapping_tensors(self, desk: Desk) -> None:
        """Sizes that fit, offsets that do not."""

        def move(header: dict[str, Any]) -> None:
            one, two = [v for k, v in header.items() if k != "__metadata__"][:2]
            size = two["data_offsets"][1] - two["data_offsets"][0]
            two["data_offsets"] = [one["data_offsets"][0], one["data_offsets"][0] + size]

        desk.header(CHECKPOINT, move)
        check(desk.run(small.text_to_image()), 4, "flux1-dev-fp8.safetensors", "begins inside another")

    @pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q\x00"])
    def test_pickle_under_a_safe_name(self, desk: Desk, start: bytes) -> None:
        (desk.models / CHECKPOINT).write_bytes(start + b"\0" * 100)
        check(desk.run(small.text_to_image()), 4, "pickle", ".safetensors version")

    def test_pickle_by_name(self, desk: Desk) -> None:
        (desk.models / "checkpoints/old.ckpt").write_bytes(b"PK\x03\x04")
        prompt = small.with_inputs(small.text_to_image(), "loader", ckpt_name="old.ckpt")
        check(desk.run(prompt), 4, "old.ckpt is a pickle")

    def test_not_safetensors(self, desk: Desk) -> None:
        (desk.models / CHECKPOINT).write_text("<html>404: please log in to download this file</html>" * 9)
        check(desk.run(small.text_to_image()), 4, "is a web page, not a model", "HF_TOKEN")

    def test_a_pointer_of_git_lfs(self, desk: Desk) -> None:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17\n"
        (desk.models / CHECKPOINT).write_text(pointer)
        check(desk.run(small.text_to_image()), 4, "is only a Git LFS pointer", "git lfs pull")

    def test_a_link_to_nowhere(self, desk: Desk) -> None:
        (desk.models / CHECKPOINT).unlink()
        (desk.models / CHECKPOINT).symlink_to("/not/mounted/a.safetensors")
        check(
            desk.run(small.text_to_image()),
            4,
            "is a link to /not/mounted/a.safetensors, which is not there",
        )

    def test_architecture_of_stable_diffusion(self, desk: Desk) -> None:
        """Its text encoder and VAE would be recognised; what is missing is the transformer."""

        def other(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.startswith(DIT)]:
                del tensors[name]
            tensors[f"{DIT}input_blocks.0.0.weight"] = torch.zeros(4, 4)
            tensors["cond_stage_model.transformer.x"] = torch.zeros(1)

        desk.change(CHECKPOINT, other)
        check(desk.run(small.text_to_image()), 4, "holds no FLUX.1 transformer; it holds", "FLUX VAE")

    @pytest.mark.parametrize(
        ("file", "node", "name"), [(LORA, "loader", "ckpt_name"), (CHECKPOINT, "lora", "lora_name")]
    )
    def test_file_of_another_kind(self, desk: Desk, file: str, node: str, name: str) -> None:
        folder = {"loader": "checkpoints", "lora": "loras"}[node]
        shutil.copy(desk.models / file, desk.models / folder / "other.safetensors")
        done = desk.run(small.with_inputs(small.subject(), node, **{name: "other.safetensors"}))
        check(done, 4, "other.safetensors holds no", "it holds")

    @pytest.mark.parametrize(
        "name",
        [
            f"{DIT}double_blocks.0.img_mlp.0.magic",
            f"{DIT}magic",
            "vae.magic",
            "text_encoders.t5xxl.transformer.magic",
            "text_encoders.clip_l.transformer.magic",
            "magic",
        ],
    )
    def test_tensor_that_nothing_uses(self, desk: Desk, name: str) -> None:
        desk.change(CHECKPOINT, lambda tensors: tensors.update({name: torch.zeros(2)}))
        check(desk.run(small.text_to_image()), 4, name)

    @pytest.mark.parametrize("file", [CHECKPOINT, PROJECTOR, TOWER, LORA])
    def test_any_tensor_that_is_missing(self, desk: Desk, file: str) -> None:
        """One in twenty of each file's tensors, each removed by itself."""
        original = load_file(desk.models / file)
        for name in list(original)[:: max(1, len(original) // 20)]:
            desk.change(file, lambda tensors, name=name: tensors.pop(name))
            done = desk.run(small.with_style(small.subject()))
            check(done, 4)
            desk.change(file, lambda tensors, name=name: tensors.update({name: original[name]}))

    @pytest.mark.parametrize("file", [CHECKPOINT, PROJECTOR, TOWER, LORA])
    def test_any_tensor_of_another_shape(self, desk: Desk, file: str) -> None:
        original = load_file(desk.models / file)
        for name in list(original)[7 :: max(1, len(original) // 20)]:
            longer = torch.cat([original[name]] * 2)
            desk.change(file, lambda tensors, name=name, longer=longer: tensors.update({name: longer}))
            done = desk.run(small.with_style(small.subject()))
            check(done, 4)
            desk.change(file, lambda tensors, name=name: tensors.update({name: original[name]}))

    def test_gap_in_block_numbers(self, desk: Desk) -> None:
        def renumber(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if ".double_blocks.1." in name]:
                tensors[name.replace(".1.", ".2.", 1)] = tensors.pop(name)

        desk.change(CHECKPOINT, renumber)
        check(desk.run(small.text_to_image()), 4, "double_blocks.2.* but no double_blocks.1.*")

    @pytest.mark.parametrize(
        ("file", "pattern", "axis", "kept", "words"),
        [
            (CHECKPOINT, "txt_in.weight", 1, 48, "T5 gives vectors of 64 numbers, the transformer takes 48"),
            (CHECKPOINT, "vector_in.in_layer.weight", 1, 16, "CLIP-L gives vectors of 32"),
            (PROJECTOR, "_projection.", 0, 64, "style projector gives vectors of 64"),
            (
                PROJECTOR,
                "_embedding_linear.0.weight",
                1,
                49,
                "64 tokens of width 64, the style projector takes 49",
            ),
        ],
    )
    def test_models_that_do_not_fit_each_other(
        self, desk: Desk, file: str, pattern: str, axis: int, kept: int, words: str
    ) -> None:
        """Each file is right, but for other companions."""
        desk.change(
            file,
            lambda tensors: tensors.update(
                {k: v.narrow(axis, 0, kept) for k, v in tensors.items() if pattern in k}
            ),
        )
        check(desk.run(small.with_style(small.subject())), 4, words, "one family")

    def test_lora_that_fits_nothing(self, desk: Desk) -> None:
        def renumber(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                blocks, number, rest = name.split(".", 2)
                tensors[f"{blocks}.{int(number) + 50}.{rest}"] = tensors.pop(name)

        desk.change(LORA, renumber)
        check(desk.run(small.subject()), 4, "uso-flux1-dit-lora-v1.safetensors", "none of its", "FLUX.1")

    def test_lora_of_another_width(self, desk: Desk) -> None:
        desk.change(LORA, lambda t: t.update({k: v[:, :-1] for k, v in t.items() if ".down." in k}))
        check(desk.run(small.subject()), 4, "uso-flux1-dit-lora-v1.safetensors")

    def test_lora_of_other_software(self, desk: Desk) -> None:
        desk.change(LORA, lambda t: (t.clear(), t.update({"lora_unet_x.lora_up.weight": torch.ones(2, 2)})))
        check(desk.run(small.subject()), 4, "holds no LoRA")


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of the first tensor."""
    entry = next(value for key, value in header.items() if key != "__metadata__")
    assert isinstance(entry, dict)
    return entry


class TestPictures:
    def test_missing(self, desk: Desk) -> None:
        (desk.root / "input/subject.png").unlink()
        check(desk.run(small.subject()), 5, "subject.png", "--image picture=PATH")

    def test_missing_picture_and_missing_model(self, desk: Desk) -> None:
        (desk.root / "input/subject.png").unlink()
        (desk.models / LORA).unlink()
        check(desk.run(small.subject()), 4, "subject.png", "--image picture=PATH", "uso-flux1-dit-lora-v1")

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n....", b"GIF89a"])
    def test_not_a_picture(self, desk: Desk, content: bytes) -> None:
        (desk.root / "input/subject.png").write_bytes(content)
        check(desk.run(small.subject()), 5, "subject.png", "LoadImage (node picture)")

    def test_hundred_megapixels(self, desk: Desk) -> None:
        Image.new("1", (10_000, 10_000)).save(desk.root / "input/subject.png")
        check(desk.run(small.subject()), 5, "100 million pixels", "64 million")

    def test_name_that_leads_out(self, desk: Desk) -> None:
        shutil.copy(desk.root / "input/subject.png", desk.root / "secret.png")
        check(
            desk.run(small.with_inputs(small.subject(), "picture", image="../secret.png")), 5, "../secret.png"
        )

    def test_picture_smaller_than_a_latent(self, desk: Desk) -> None:
        Image.new("RGB", (5, 5)).save(desk.root / "input/subject.png")
        check(desk.run(small.subject()), 5, "VAEEncode")

    def test_scaled_to_nothing(self, desk: Desk) -> None:
        prompt = small.subject() | {
            "scaled": {
                "class_type": "ImageScaleToMaxDimension",
                "inputs": {"image": ["picture", 0], "upscale_method": "area", "largest_size": 0},
            }
        }
        check(desk.run(small.with_inputs(prompt, "encode", pixels=["scaled", 0])), 5, "80x48", "0x0")

    def test_empty_reference_of_any_channels(self, desk: Desk) -> None:
        """EmptyLatentImage makes 4 channels for any model, here as for the latent that is sampled."""
        prompt = small.subject()
        prompt["encode"] = {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        }
        assert desk.run(prompt).code == 0

    def test_batches_that_do_not_fit(self, desk: Desk) -> None:
        three = {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 9},
        }
        prompt = small.with_style(small.subject())
        styled = prompt | {"style picture": three}
        check(desk.run(small.with_inputs(styled, "empty", batch_size=4)), 3, "batch of 3", "KSampler")
        assert desk.run(styled).code == 0  # of more than there are latents the first count
        assert desk.run(prompt | {"picture": three}).code == 0

    def test_latent_of_another_model(self, desk: Desk) -> None:
        prompt = small.text_to_image()
        prompt = small.with_inputs(prompt, "decode", samples=["empty", 0])
        prompt["empty"] = {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        }
        check(desk.run(prompt), 3, "VAEDecode")


class TestSaving:
    def test_output_that_cannot_be_made(self, desk: Desk) -> None:
        (desk.root / "output").write_text("a file")
        check(desk.run(small.text_to_image()), 2, "--output", str(desk.root / "output"))

    @pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a/../../b"])
    def test_prefix_that_leads_out(self, desk: Desk, prefix: str) -> None:
        check(
            desk.run(small.with_inputs(small.text_to_image(), "save", filename_prefix=prefix)), 2, "SaveImage"
        )
        assert not list(desk.root.rglob("*_.png"))

    def test_prefix_that_is_too_long(self, desk: Desk) -> None:
        prompt = small.with_inputs(small.text_to_image(), "save", filename_prefix="x" * 300)
        check(desk.run(prompt), 3, "SaveImage (node save)", "240 bytes")

    def test_full_disk(self, desk: Desk) -> None:
        """In a process of its own, with a limit on file sizes for the disk."""
        (desk.root / "prompt.json").write_text(json.dumps(small.text_to_image()))
        limited = (
            "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
            "sys.argv[0] = 'usoflow'; runpy.run_module('usoflow', run_name='__main__')"
        )
        arguments = [
            "run",
            desk.root / "prompt.json",
            "--models",
            desk.models,
            "--output",
            desk.root / "output",
        ]
        done = subprocess.run(
            [sys.executable, "-c", limited, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        check(Done(done.returncode, done.stdout, done.stderr), 6, "File too large", "--output")
        assert list((desk.root / "output").iterdir()) == []

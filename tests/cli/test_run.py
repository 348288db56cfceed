"""`usoflow run`: every variation of the official workflow, on small untrained models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import small
from shell import Done, usoflow
from usoflow.nodes import registry
from usoflow.workflow import metadata
from usoflow.workflow.loading import load_json

PAIRS = Path(__file__).parents[1] / "pairs"
TEMPLATE = "template:flux1_dev_uso_reference_image_gen"
SMALL = (
    *("--set", "KSampler.steps=2"),
    *("--set", "ImageScaleToMaxDimension.largest_size=64"),
    *("--set", "EmptySD3LatentImage.width=64"),
    *("--set", "EmptySD3LatentImage.height=64"),
)
SMALL_LATENT = (
    *("--set", "KSampler.steps=2"),
    *("--set", "EmptyLatentImage.width=64"),
    *("--set", "EmptyLatentImage.height=64"),
)


@pytest.fixture
def run(small_models: Path, tmp_path: Path) -> Any:
    """`run(prompt or file, *options)` -> its JSON record; it must succeed, silently on stderr."""

    def start(what: small.Prompt | Path | str, *options: str | Path) -> dict[str, Any]:
        source: Path | str = tmp_path / "prompt.json"
        if isinstance(what, dict):
            (tmp_path / "prompt.json").write_text(json.dumps(what))
        else:
            source = what
        dtype = () if "--dtype" in options else ("--dtype", "fp32")
        done = raw(source, "--json", *dtype, *options, models=small_models, output=tmp_path / "out")
        assert (done.code, done.err) == (0, ""), done
        return dict(json.loads(done.out))

    return start


FAILS = """
class Fails:
    CATEGORY, RETURN_TYPES, FUNCTION = "test", ("IMAGE",), "run"
    @classmethod
    def INPUT_TYPES(s): return {"required": {"image": ("IMAGE",)}}
    def run(self, image): raise ValueError("on purpose")
NODE_CLASS_MAPPINGS = {"Fails": Fails}
"""


def raw(source: Path | str, *options: str | Path, models: Path, output: Path) -> Done:
    return usoflow("run", source, "--models", models, "--output", output, "--device", "cpu", *options)


def pixels(record: dict[str, Any], index: int = 0) -> NDArray[np.int16]:
    with Image.open(record["images"][index]) as image:
        return np.asarray(image).astype(np.int16)


def differ(*records: dict[str, Any]) -> bool:
    """Whether all pictures are pairwise different."""
    return len({pixels(record).tobytes() for record in records}) == len(records)


class TestOfficialWorkflow:
    def test_the_four_variations_run_and_differ(self, run: Any, small_models: Path) -> None:
        subject = small_models.parent / "input/subject.png"
        style = small_models.parent / "input/style.png"
        seed = ("--seed", "7", "--set", "CLIPTextEncode.text=a cat")
        both_styles = ("--image", f"88={style}", "--image", f"91={subject}")
        records = {
            "text": run(PAIRS / "uso_t2i_style_bypassed.ui.json", *seed, *SMALL_LATENT),
            "subject": run(PAIRS / "uso_template.ui.json", *seed, *SMALL, "--image", f"LoadImage={subject}"),
            "style": run(PAIRS / "uso_style_only.ui.json", *seed, *SMALL_LATENT, *both_styles),
            "both": run(
                PAIRS / "uso_style_one.ui.json", *seed, *SMALL, "--image", f"47={subject}", *one_style(style)
            ),
        }
        assert differ(*records.values())
        assert all(pixels(record).shape == (64, 64, 3) for record in records.values())
        assert all(record["seeds"] == [7] for record in records.values())

    def test_template_by_name(self, run: Any, small_models: Path) -> None:
        picture = small_models.parent / "input/subject.png"
        file = run(PAIRS / "uso_template.ui.json", *SMALL, "--image", f"47={picture}")
        named = run(TEMPLATE, *SMALL, "--image", f"47={picture}")
        assert (pixels(file) == pixels(named)).all()

    def test_lora_bypassed_in_the_editor(self, run: Any, small_models: Path) -> None:
        options = (*SMALL, "--image", f"47={small_models.parent / 'input/subject.png'}")
        with_lora = run(PAIRS / "uso_template.ui.json", *options)
        without = run(PAIRS / "uso_inner_lora_bypassed.ui.json", *options)
        zero = run(PAIRS / "uso_template.ui.json", *options, "--set", "LoraLoaderModelOnly.strength_model=0")
        assert differ(with_lora, without)
        assert (pixels(without) == pixels(zero)).all()


class TestEmbeddedGraph:
    """What a picture shows in the editor is what was run."""

    def test_set_image_and_seed(self, run: Any, small_models: Path) -> None:
        picture = small_models.parent / "input/subject.png"
        record = run(
            TEMPLATE, *SMALL, "--image", f"47={picture}", "--seed", "7",
            "--set", "CLIPTextEncode.text=a {cat} on a {b|c}", "--set", "112:43.strength_model=0.5",
            "--set", "SaveImage.filename_prefix=odd_%KSampler.seed%",
        )  # fmt: skip
        assert Path(record["images"][0]).name == "odd_7_00001_.png"
        prompt, workflow = embedded(record), embedded(record, "workflow")
        assert prompt["112:31"]["inputs"]["seed"] == 7
        assert prompt["112:6"]["inputs"]["text"] == "a {cat} on a {b|c}"
        assert prompt["112:43"]["inputs"]["strength_model"] == 0.5
        assert converted(workflow) == plain(prompt)

    def test_a_picture_changed_again(self, run: Any, small_models: Path) -> None:
        options = ("--image", f"47={small_models.parent / 'input/subject.png'}")
        first = run(TEMPLATE, *SMALL, *options)
        second = run(Path(first["images"][0]), *options, "--set", "EmptySD3LatentImage.width=32")
        prompt, workflow = embedded(second), embedded(second, "workflow")
        assert prompt["112:110"]["inputs"]["width"] == 32
        assert converted(workflow) == plain(prompt)

    def test_a_change_that_no_field_can_show(self, small_models: Path, tmp_path: Path) -> None:
        """Then there is no graph inside rather than a wrong one: the editor opens the prompt."""
        picture = small_models.parent / "input/subject.png"
        link = '112:31.model=["112:30", 0]'
        options = (*SMALL, "--image", f"47={picture}", "--set", link)
        done = raw(TEMPLATE, *options, models=small_models, output=tmp_path)
        assert "112:31.model" in done.err
        texts = metadata.read(Path(done.out.splitlines()[0]).read_bytes())
        assert set(texts) == {"prompt"}
        assert json.loads(texts["prompt"])["112:31"]["inputs"]["model"] == ["112:30", 0]


def converted(workflow: dict[str, Any]) -> dict[str, Any]:
    return plain(load_json(workflow, registry()).prompt.to_json())


def plain(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


def one_style(picture: Path) -> tuple[str, str]:
    """The picture for the style node of `uso_style_one`."""
    prompt = json.loads((PAIRS / "uso_style_one.api.json").read_text())
    (node,) = [key for key, node in prompt.items() if node.get("class_type") == "LoadImage" and key != "47"]
    return "--image", f"{node}={picture}"


def two_subjects() -> small.Prompt:
    """`small.subject` with a second subject."""
    prompt = small.subject() | {
        "second": {"class_type": "LoadImage", "inputs": {"image": "style.png"}},
        "second latent": {
            "class_type": "VAEEncode",
            "inputs": {"pixels": ["second", 0], "vae": ["loader", 2]},
        },
        "second reference": {
            "class_type": "ReferenceLatent",
            "inputs": {"conditioning": ["reference", 0], "latent": ["second latent", 0]},
        },
    }
    return small.with_inputs(prompt, "method", conditioning=["second reference", 0])


class TestReferences:
    def test_several_subjects(self, run: Any) -> None:
        assert differ(run(small.text_to_image()), run(small.subject()), run(two_subjects()))

    def test_methods(self, run: Any) -> None:
        """Two pictures, since offset and index place the first one alike."""
        methods = ("uxo/uno", "offset", "index")
        prompts = [small.with_inputs(two_subjects(), "method", reference_latents_method=m) for m in methods]
        assert differ(*map(run, prompts))

    def test_uso_is_another_name_of_uxo(self, run: Any) -> None:
        """The official example pictures carry it."""
        other = small.with_inputs(small.subject(), "method", reference_latents_method="uso")
        assert (pixels(run(small.subject())) == pixels(run(other))).all()

    def test_several_styles(self, run: Any) -> None:
        one = small.with_style(small.text_to_image())
        two = one | {
            "vision 2": {
                "class_type": "CLIPVisionEncode",
                "inputs": {"clip_vision": ["tower", 0], "image": ["picture 2", 0], "crop": "center"},
            },
            "picture 2": {"class_type": "LoadImage", "inputs": {"image": "subject.png"}},
            "style 2": {
                "class_type": "USOStyleReference",
                "inputs": {
                    "model": ["style", 0],
                    "model_patch": ["patch", 0],
                    "clip_vision_output": ["vision 2", 0],
                },
            },
        }
        two = small.with_inputs(two, "sampler", model=["style 2", 0])
        assert differ(run(small.text_to_image()), run(one), run(two))

    def test_the_same_style_twice_is_not_once(self, run: Any) -> None:
        one = small.with_style(small.subject())
        two = one | {"again": small.with_inputs(one, "style", model=["style", 0])["style"]}
        assert differ(run(one), run(small.with_inputs(two, "sampler", model=["again", 0])))


class TestSampling:
    @pytest.mark.parametrize("styled", [False, True], ids=["text", "style"])
    def test_a_batch_has_the_pictures_of_its_noise(self, run: Any, styled: bool) -> None:
        """The first picture of a batch is the picture of a batch of one; the second is another."""
        prompt = small.with_style(small.subject()) if styled else small.text_to_image()
        one, two = run(prompt), run(small.with_inputs(prompt, "empty", batch_size=2))
        assert len(two["images"]) == 2
        assert np.abs(pixels(one) - pixels(two, 0)).max() <= 1
        assert np.abs(pixels(one) - pixels(two, 1)).max() > 1

    def test_cfg_uses_the_negative_prompt(self, run: Any) -> None:
        """With style, where the reference fails."""
        prompt = small.with_style(small.text_to_image()) | {
            "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "rain", "clip": ["loader", 1]}}
        }
        plain = small.with_inputs(prompt, "sampler", cfg=2.0)
        negative = small.with_inputs(plain, "sampler", negative=["negative", 0])
        assert differ(run(prompt), run(plain), run(negative))
        off = small.with_inputs(negative, "sampler", cfg=1.0)
        assert (pixels(run(off)) == pixels(run(prompt))).all()

    def test_without_cfg_the_negative_is_not_even_prepared(self, run: Any) -> None:
        """A negative that could not be used at all does no harm."""
        prompt = small.with_inputs(small.text_to_image(), "empty", batch_size=4) | {
            "three": {
                "class_type": "EmptySD3LatentImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 3},
            },
            "unusable": {
                "class_type": "ReferenceLatent",
                "inputs": {"conditioning": ["zero", 0], "latent": ["three", 0]},
            },
        }
        run(small.with_inputs(prompt, "sampler", negative=["unusable", 0]))
        with pytest.raises(AssertionError, match="batch_mismatch"):
            run(small.with_inputs(prompt, "sampler", negative=["unusable", 0], cfg=2.0))

    def test_cfg_and_batch_with_style(self, run: Any) -> None:
        prompt = small.with_inputs(small.with_style(small.subject()), "sampler", cfg=2.0)
        one, two = run(prompt), run(small.with_inputs(prompt, "empty", batch_size=2))
        assert np.abs(pixels(one) - pixels(two, 0)).max() <= 1

    def test_denoise_keeps_the_picture_more_the_less_it_is(self, run: Any) -> None:
        prompt = small.with_inputs(small.subject(), "sampler", latent_image=["encode", 0], steps=4)
        kept = small.with_inputs(prompt, "decode", samples=["encode", 0])
        origin = pixels(run(kept)).astype(np.float64)
        distance = [
            np.abs(pixels(run(small.with_inputs(prompt, "sampler", denoise=denoise))) - origin).mean()
            for denoise in (0.0, 0.05, 0.5, 1.0)
        ]
        assert distance[0] == 0
        assert 0 < distance[1] < distance[2]
        assert distance[3] > distance[1]

    def test_easy_cache(self, run: Any) -> None:
        prompt = small.with_inputs(small.text_to_image(), "sampler", steps=12, model=["cache", 0])
        prompt["cache"] = {
            "class_type": "EasyCache",
            "inputs": {
                "model": ["loader", 0],
                "reuse_threshold": 0.0,
                "start_percent": 0.1,
                "end_percent": 0.95,
                "verbose": False,
            },
        }
        plain = small.with_inputs(prompt, "sampler", model=["loader", 0])
        eager = small.with_inputs(prompt, "cache", reuse_threshold=3.0)
        assert differ(run(plain), run(eager))
        assert (pixels(run(plain)) == pixels(run(prompt))).all()


class TestOptions:
    def test_seed(self, run: Any) -> None:
        one, same, other = (run(small.text_to_image(), "--seed", seed) for seed in ("5", "5", "6"))
        assert (one["seeds"], other["seeds"]) == ([5], [6])
        assert (pixels(one) == pixels(same)).all()
        assert differ(one, other)
        assert run(small.with_inputs(small.text_to_image(), "sampler", seed=5))["seeds"] == [5]
        assert run(small.text_to_image(), "--seed", str(2**64 - 1))["seeds"] == [2**64 - 1]

    def test_set_by_id_title_and_type(self, run: Any) -> None:
        prompt = small.text_to_image()
        prompt["text"]["_meta"] = {"title": "My Prompt"}
        texts = ("text.text=a dog", "My Prompt.text=a dog", "CLIPTextEncode.text=a dog")
        first, *others = (run(prompt, "--set", text) for text in texts)
        assert all((pixels(first) == pixels(other)).all() for other in others)
        assert differ(first, run(prompt))

    def test_set_keeps_texts_that_look_like_numbers(self, run: Any) -> None:
        record = run(small.text_to_image(), "--set", "text.text=1984", "--set", "save.filename_prefix=12")
        assert Path(record["images"][0]).name == "12_00001_.png"
        assert embedded(record)["text"]["inputs"]["text"] == "1984"

    def test_image(self, run: Any, small_models: Path, tmp_path: Path) -> None:
        picture = tmp_path / "elsewhere" / "mine.png"
        picture.parent.mkdir()
        Image.open(small_models.parent / "input/style.png").save(picture)
        given = run(small.subject(), "--image", f"picture={picture}")
        same = run(small.with_inputs(small.subject(), "picture", image="style.png"))
        assert (pixels(given) == pixels(same)).all()
        assert embedded(given)["picture"]["inputs"]["image"] == "mine.png"

    def test_image_of_a_name_that_another_node_uses(
        self, run: Any, small_models: Path, tmp_path: Path
    ) -> None:
        """Only the node that is named gets the picture."""
        impostor = tmp_path / "subject.png"
        Image.open(small_models.parent / "input/style.png").save(impostor)
        prompt = small.with_style(small.subject())
        expected = run(prompt)
        given = run(prompt, "--image", f"style picture={impostor}")
        assert (pixels(given) == pixels(expected)).all()

    def test_input_folder(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        Image.new("RGB", (32, 32), (9, 9, 200)).save(tmp_path / "mine/subject.png")
        assert differ(run(small.subject()), run(small.subject(), "--input", tmp_path / "mine"))

    def test_pictures_beside_the_workflow(self, run: Any, tmp_path: Path) -> None:
        Image.new("RGB", (32, 32), (9, 9, 200)).save(tmp_path / "beside.png")
        assert run(small.with_inputs(small.subject(), "picture", image="beside.png"))["images"]

    @pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16", "fp32"])
    def test_dtypes_are_close(self, run: Any, dtype: str) -> None:
        exact = pixels(run(small.with_style(small.subject()), "--dtype", "fp32"))
        record = run(small.with_style(small.subject()), "--dtype", dtype)
        assert np.abs(pixels(record) - exact).mean() < 4
        assert record["dtype"] == {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
            dtype, record["dtype"]
        )

    def test_less_memory_gives_the_same_picture(self, run: Any) -> None:
        prompt = small.with_style(small.subject())
        plain, budgeted = (run(prompt, "--dtype", "bf16", *more) for more in ((), ("--vram", "1KB")))
        assert (pixels(budgeted) == pixels(plain)).all()

    def test_comfyui_folder_and_variable(
        self, run: Any, small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(small.text_to_image(), "--models", small_models.parent)
        (tmp_path / "prompt.json").write_text(json.dumps(small.text_to_image()))
        monkeypatch.setenv("USOFLOW_MODELS", str(small_models))
        done = usoflow("run", tmp_path / "prompt.json", "--output", tmp_path / "out", "--json")
        assert done.code == 0

    def test_preview_goes_to_a_cache_folder(
        self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        prompt = small.text_to_image()
        prompt["save"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
        record = run(prompt)
        assert Path(record["images"][0]).is_file()
        assert str(tmp_path / "cache") in record["images"][0]
        assert not (tmp_path / "out").exists()


def embedded(record: dict[str, Any], key: str = "prompt") -> dict[str, Any]:
    return dict(json.loads(metadata.read(Path(record["images"][0]).read_bytes())[key]))


class TestPictureAgain:
    def test_a_picture_runs_again_and_gives_itself(self, run: Any, small_models: Path) -> None:
        picture = small_models.parent / "input/subject.png"
        first = run(PAIRS / "uso_template.ui.json", *SMALL, "--image", f"47={picture}", "--seed", "11")
        again = run(Path(first["images"][0]))
        assert first["images"] != again["images"]
        assert (pixels(first) == pixels(again)).all()
        assert embedded(first) == embedded(again)
        assert embedded(again, "workflow") == embedded(first, "workflow")

    def test_prompt_is_embedded_as_it_was_run(self, run: Any) -> None:
        record = run(small.text_to_image(), "--seed", "3", "--set", "sampler.steps=1")
        inputs = embedded(record)["sampler"]["inputs"]
        assert (inputs["seed"], inputs["steps"]) == (3, 1)


class TestText:
    def test_files_then_seed_time_and_memory(self, small_models: Path, tmp_path: Path) -> None:
        (tmp_path / "prompt.json").write_text(json.dumps(small.text_to_image()))
        done = raw(tmp_path / "prompt.json", "--seed", "42", models=small_models, output=tmp_path / "out")
        first, summary, *_ = done.out.splitlines()
        assert first == str(tmp_path / "out/out_00001_.png")
        assert " s · peak " in summary
        assert "seed 42" in summary
        assert "cpu " in summary
        assert done.err == ""

    def test_json_is_one_object(self, run: Any) -> None:
        record = run(small.text_to_image())
        keys = {"images", "seeds", "seconds", "device", "dtype", "nodes", "outputs", "warnings"}
        assert set(record) == keys
        assert record["outputs"]["save"]["images"][0]["filename"] == Path(record["images"][0]).name
        assert {node["class_type"] for node in record["nodes"]} >= {"KSampler", "VAEDecode", "SaveImage"}
        assert record["warnings"] == []

    def test_outputs_that_cannot_run_are_left_out_and_said(self, small_models: Path, tmp_path: Path) -> None:
        prompt = small.text_to_image() | {
            "broken": {"class_type": "PreviewImage", "inputs": {}},
        }
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        done = raw(tmp_path / "prompt.json", "--json", models=small_models, output=tmp_path / "out")
        assert done.code == 0
        assert "PreviewImage (node broken)" in done.err
        assert len(json.loads(done.out)["images"]) == 1
        assert "node broken" in json.loads(done.out)["warnings"][0]

    def test_an_unknown_node_that_no_output_needs_is_left_out(
        self, small_models: Path, tmp_path: Path
    ) -> None:
        """Extensions of the editor leave such nodes."""
        prompt = small.text_to_image() | {
            "stray": {"class_type": "Fast Groups Bypasser (rgthree)", "inputs": {}},
            "idle": {"class_type": "ImageInvert", "inputs": {"image": ["stray", 0]}},
        }
        prompt["save"]["inputs"]["metadata"] = ["stray", 0]  # which SaveImage does not take
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        done = raw(tmp_path / "prompt.json", "--json", models=small_models, output=tmp_path / "out")
        assert done.code == 0, done.err
        assert "node stray of the unknown type Fast Groups Bypasser (rgthree)" in done.err
        assert len(json.loads(done.out)["images"]) == 1

    @pytest.mark.parametrize("as_json", [True, False])
    def test_pictures_that_were_saved_before_it_failed_are_told(
        self, small_models: Path, tmp_path: Path, as_json: bool
    ) -> None:
        prompt = {
            "empty": {
                "class_type": "EmptyImage",
                "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0},
            },
            "first": {
                "class_type": "SaveImage",
                "inputs": {"images": ["empty", 0], "filename_prefix": "first"},
            },
            "fails": {"class_type": "Fails", "inputs": {"image": ["empty", 0]}},
            "second": {"class_type": "SaveImage", "inputs": {"images": ["fails", 0], "filename_prefix": "b"}},
        }
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        (tmp_path / "nodes").mkdir()
        (tmp_path / "nodes" / "fails.py").write_text(FAILS)
        options = ["--custom-nodes", str(tmp_path / "nodes"), *(["--json"] if as_json else [])]
        done = raw(tmp_path / "prompt.json", *options, models=small_models, output=tmp_path / "out")
        assert done.code == 6
        saved = tmp_path / "out" / "first_00001_.png"
        assert saved.exists()
        if as_json:
            assert json.loads(done.out)["error"]["images"] == [str(saved)]
        else:
            assert str(saved) in done.out
            assert "on purpose" in done.err

    def test_pictures_for_a_servers_clients_are_not_kept(self, small_models: Path, tmp_path: Path) -> None:
        prompt = small.text_to_image()
        prompt["save"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["decode", 0]}}
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        done = raw(tmp_path / "prompt.json", models=small_models, output=tmp_path / "out")
        assert done.code == 0, done.err
        assert "node save (SaveImageWebsocket) saves nothing" in done.err


class TestInterrupt:
    def interrupted(self, prompt: Path, models: Path, output: Path, *, after: str) -> tuple[int, str, float]:
        """Exit code, stderr and the seconds it took to stop after Ctrl+C, sent when `after` has happened."""
        arguments = [sys.executable, "-c", WATCHED, "run", str(prompt), "--models", str(models)]
        process = subprocess.Popen(
            [*arguments, "--output", str(output), "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "WATCHED": after},
        )
        assert process.stdout is not None
        try:
            while "ready" not in (line := process.stdout.readline()):
                assert line, "it ended before"
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            return process.returncode, errors, time.monotonic() - start
        finally:
            process.kill()

    @pytest.mark.parametrize("after", ["step", "import"])
    def test_ctrl_c(self, small_models: Path, tmp_path: Path, after: str) -> None:
        """While it samples (thousands of steps to go), and before, while torch is imported."""
        prompt = small.with_inputs(small.text_to_image(), "sampler", steps=10000)
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        code, errors, seconds = self.interrupted(
            tmp_path / "prompt.json", small_models, tmp_path / "out", after=after
        )
        assert code == 130
        assert "Traceback" not in errors
        assert seconds < 20  # a busy machine; alone it is a fraction of a second
        assert not (tmp_path / "out").exists()


def test_what_a_custom_node_prints_is_not_the_result(small_models: Path, tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "loud.py").write_text(LOUD, encoding="utf-8")
    prompt = small.text_to_image() | {"loud": {"class_type": "Loud", "inputs": {"image": ["decode", 0]}}}
    prompt["save"]["inputs"]["images"] = ["loud", 0]
    (tmp_path / "loud.json").write_text(json.dumps(prompt))
    done = raw(
        tmp_path / "loud.json", "--json", "--custom-nodes", tmp_path / "nodes",
        models=small_models, output=tmp_path / "out",
    )  # fmt: skip
    assert json.loads(done.out)["images"]
    assert "imported" in done.err
    assert "run" in done.err


def test_what_a_node_shows_as_text_is_told(small_models: Path, tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "told.py").write_text(TOLD, encoding="utf-8")
    prompt = {"t": {"class_type": "Told", "inputs": {"number": 2}}}
    (tmp_path / "told.json").write_text(json.dumps(prompt))
    given = (tmp_path / "told.json", "--custom-nodes", tmp_path / "nodes")
    done = raw(*given, "--json", models=small_models, output=tmp_path / "out")
    assert json.loads(done.out)["outputs"] == {"t": {"text": ["4"]}}
    done = raw(*given, models=small_models, output=tmp_path / "out")
    assert 'node t shows text: ["4"]' in done.out
    described = usoflow("nodes", "Told", "--custom-nodes", tmp_path / "nodes")
    assert "one of 1, 2, 3" in described.out
    failed = raw(*given, "--set", "t.number=3", models=small_models, output=tmp_path / "out")
    assert failed.code == 6
    assert "told.py" in failed.err  # whoever wrote it is told the place
    assert "KeyError: 'three'" in failed.err


def test_several_words_after_an_option(small_models: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.json").write_text(json.dumps(small.text_to_image()))
    done = raw(
        tmp_path / "prompt.json", "--set", "sampler.steps=1", "sampler.seed=9", "--json",
        models=small_models, output=tmp_path / "out",
    )  # fmt: skip
    assert json.loads(done.out)["seeds"] == [9]


@pytest.mark.parametrize("stdout", ["/dev/full", "closed"])
def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path: Path, stdout: str) -> None:
    command = [sys.executable, "-m", "usoflow", "run", str(tmp_path / "none.json"), "--json"]
    if stdout == "closed":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(stdout, os.O_WRONLY)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "none.json" in done.stderr


TOLD = """
class Told:
    CATEGORY, RETURN_TYPES, FUNCTION, OUTPUT_NODE = "test", (), "run", True
    @classmethod
    def INPUT_TYPES(s): return {"required": {"number": ([1, 2, 3], {"default": 2})}}
    def run(self, number):
        return {"ui": {"text": [str({1: 1, 2: 4}[number] if number < 3 else {}["three"])]}}
NODE_CLASS_MAPPINGS = {"Told": Told}
"""


LOUD = """
print("imported")
class Loud:
    CATEGORY, RETURN_TYPES, FUNCTION = "test", ("IMAGE",), "run"
    @classmethod
    def INPUT_TYPES(s): return {"required": {"image": ("IMAGE",)}}
    def run(self, image):
        print("run")
        return (image,)
NODE_CLASS_MAPPINGS = {"Loud": Loud}
"""


# Says "ready" when the moment has come that a test waits for.
WATCHED = """
import os, sys, time
if os.environ["WATCHED"] == "import":
    from usoflow.api.engine import Engine
    start = Engine.start
    def slowly(engine):  # an exception in an import may be swallowed by what is imported
        print("ready", flush=True, file=sys.__stdout__)
        try:
            time.sleep(2)
        except KeyboardInterrupt:
            pass
        start(engine)
    Engine.start = slowly
else:
    import usoflow.cli.report as report
    from contextlib import contextmanager
    from usoflow.execution.progress import NodeProgress
    @contextmanager
    def progress(**options):
        def listen(event):
            if isinstance(event, NodeProgress) and event.step == 2:
                print("ready", flush=True, file=sys.__stdout__)
        yield listen
    report.progress = progress
from usoflow.cli.main import main
main()
"""

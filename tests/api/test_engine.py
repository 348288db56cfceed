"""The engine on small models: results, what stays loaded, progress and cancellation, pictures from memory."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import small
import usoflow
from usoflow import Engine, UsoflowError, Workflow
from usoflow.api.engine import _loras
from usoflow.execution.progress import Cancellation, NodeProgress, NodeStarted
from usoflow.settings import POCKET_MODELS


class Size(NamedTuple):
    width: Any
    height: Any


@pytest.fixture
def engine(small_models: Path, tmp_path: Path) -> Any:
    with Engine(models=small_models, output=tmp_path / "out", device="cpu", dtype="fp32") as engine:
        yield engine


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "prompt.json").write_text(json.dumps(small.with_style(small.subject())))
    return tmp_path / "prompt.json"


def test_a_result_tells_everything(engine: Engine, file: Path, tmp_path: Path) -> None:
    result = engine.run(file)
    assert result.paths == (tmp_path / "out" / "out_00001_.png",)
    assert result.images[0].size == (64, 64)
    assert json.loads(result.images[0].info["prompt"]) == result.workflow.to_prompt()
    assert result.seeds == (1,)
    assert (result.device, result.dtype) == ("cpu", "float32")
    assert {node.class_type for node in result.nodes} >= {"KSampler", "SaveImage"}
    assert result.seconds >= sum(node.seconds for node in result.nodes) > 0


def test_models_and_encodings_stay(engine: Engine, file: Path) -> None:
    first = engine.run(file)
    again = engine.run(Workflow.load(file).with_seed(2))
    assert not first.cached
    assert [node.class_type for node in again.nodes] == ["KSampler", "VAEDecode", "SaveImage"]
    assert not np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))


def test_another_output_folder_gets_its_pictures(
    small_models: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written elsewhere is not taken for it; all else is known."""
    with Engine(models=small_models, device="cpu") as engine:
        for name in ("one", "two"):
            monkeypatch.setenv("USOFLOW_OUTPUT", str(tmp_path / name))
            result = engine.run(file)
            assert result.paths == (tmp_path / name / "out_00001_.png",)
            assert result.images[0].size == (64, 64)
    assert [node.class_type for node in result.nodes] == ["SaveImage"]


def test_threads_wait_for_each_other(small_models: Path, tmp_path: Path) -> None:
    """With blocks that come and leave, which two runs at once would take from each other."""
    prompt = small.with_style(small.subject())
    given: dict[str, Any] = {"models": small_models, "output": tmp_path / "out", "device": "cpu"}
    with Engine(**given, vram="1KB") as engine, ThreadPoolExecutor(4) as pool:
        seeds = [1, 2, 3, 4] * 2
        asked = [Workflow.load(prompt).with_seed(seed) for seed in seeds]
        results = list(pool.map(engine.run, asked))
        pictures = [np.asarray(result.images[0]) for result in results]
    for first, second in zip(pictures[:4], pictures[4:], strict=True):
        assert np.array_equal(first, second)
    assert not np.array_equal(pictures[0], pictures[1])


def test_while_one_runs_others_prepare_and_those_that_wait_can_be_stopped(engine: Engine, file: Path) -> None:
    """The thread of a window must not stand still."""
    running, done = threading.Event(), threading.Event()

    def hold(event: object) -> None:
        running.set()
        assert done.wait(60)

    cancellation = usoflow.Cancellation()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(engine.run, file, progress=hold)
        try:
            assert running.wait(60)
            waiting = pool.submit(engine.run, file, cancellation=cancellation)
            prepared = pool.submit(engine.workflow, "a fox", subject=Image.new("RGB", (32, 32)))
            assert prepared.result(30).pictures
            assert not waiting.done()
            cancellation.set()
            with pytest.raises(UsoflowError, match="stopped"):
                waiting.result(30)
            assert not first.done()
        finally:
            done.set()
        assert first.result(60).paths


def test_progress_is_told(engine: Engine, file: Path) -> None:
    events: list[Any] = []
    engine.run(file, progress=events.append)
    assert [e.step for e in events if isinstance(e, NodeProgress)] == [1, 2]
    assert any(isinstance(e, NodeStarted) and e.class_type == "KSampler" for e in events)
    assert all(isinstance(event, usoflow.Event) for event in events)


def test_what_generate_runs_can_be_changed(engine: Engine, small_models: Path) -> None:
    subject = small_models.parent / "input" / "subject.png"
    asked = {"subject": subject, "size": (32, 32), "subject_size": 32, "steps": 1, "seed": 3}
    workflow = engine.workflow("a fox", **asked)
    assert engine.generate("a fox", **asked).workflow.to_prompt() == workflow.to_prompt()
    changed = engine.run(workflow.set("KSampler.sampler_name", "heun"))
    (sampler,) = (n for n in changed.workflow.prompt.nodes.values() if n.class_type == "KSampler")
    assert sampler.inputs["sampler_name"] == "heun"
    with pytest.raises(TypeError, match="stepz"):
        engine.generate("a fox", stepz=3)  # type: ignore[call-arg]


def test_what_a_listener_raises_is_the_callers_own(engine: Engine, file: Path) -> None:
    class MineError(Exception):
        pass

    def fail(event: object) -> None:
        if isinstance(event, NodeProgress):
            raise MineError

    with pytest.raises(MineError):
        engine.run(file, progress=fail)


def test_a_listener_may_close_the_engine(engine: Engine, file: Path) -> None:
    """The run goes on to its end, and the next one loads the models anew."""

    def close(event: object) -> None:
        if isinstance(event, NodeProgress):
            engine.close()

    assert engine.run(file, progress=close).paths[0].is_file()
    assert engine.run(file).paths[0].is_file()


def test_a_picture_from_memory_goes_with_its_engine(
    engine: Engine, small_models: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"size": (32, 32), "steps": 1, "subject_size": 32, "seed": 1}
    result = usoflow.generate(
        "a fox",
        subject=Image.new("RGB", (32, 32)),
        models=small_models,
        output=tmp_path,
        device="cpu",
        **given,
    )
    with pytest.raises(UsoflowError) as caught:
        engine.run(result.workflow)
    assert caught.value.code == "image_missing"
    assert "with_picture(NODE, FILE)" in caught.value.remedy
    again = result.workflow.with_picture("LoadImage", small_models.parent / "input" / "subject.png")
    assert engine.run(again).paths


@pytest.mark.parametrize("name", ["models", "inputs", "output", "custom_nodes"])
def test_an_empty_path_is_refused(name: str) -> None:
    with pytest.raises(UsoflowError, match=f"{name} is an empty path") as caught:
        Engine(**{name: ""})  # type: ignore[arg-type]
    assert caught.value.code == "settings_invalid"


def test_of_pictures_from_memory_the_last_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usoflow.api.engine.KEPT_PICTURES", 2)
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]

    def written(picture: Image.Image) -> Path:
        (path,) = engine.workflow("a cat", subject=picture).pictures.values()
        return path

    red, green = written(pictures[0]), written(pictures[1])
    assert written(pictures[0]) == red  # again, so green is now the oldest
    blue = written(pictures[2])
    assert [path.exists() for path in (red, green, blue)] == [True, False, True]


def test_generating_can_be_stopped(engine: Engine) -> None:
    cancellation = usoflow.Cancellation()
    cancellation.set()
    with pytest.raises(UsoflowError, match="stopped"):
        engine.generate("a fox", size=(32, 32), steps=1, cancellation=cancellation)


def test_pictures_are_those_of_the_run_or_none(engine: Engine) -> None:
    """Names that are free are used again: what has been moved away may be another run's by now."""
    first, second = (engine.generate("a fox", size=(32, 32), steps=1, seed=seed) for seed in (1, 2))
    assert first.images[0].tobytes() != second.images[0].tobytes()
    kept, moved = (engine.generate("a fox", size=(32, 32), steps=1, seed=seed) for seed in (3, 4))
    assert kept.images
    os.replace(moved.paths[0], moved.paths[0].with_suffix(".moved"))
    with pytest.raises(UsoflowError, match="no longer what this run wrote") as caught:
        _ = moved.images
    assert caught.value.code == "image_missing"
    again = engine.generate("a fox", size=(32, 32), steps=1, seed=5)
    assert again.paths == moved.paths
    with pytest.raises(UsoflowError, match="no longer what this run wrote"):
        _ = moved.images


def test_a_result_is_shown_in_a_few_words(engine: Engine) -> None:
    result = engine.generate("a fox", size=(32, 32), steps=1, seed=1)
    assert len(repr(result)) < 1000
    assert len(repr(result.workflow)) < 1000


def test_numbers_of_numpy_are_numbers(engine: Engine, file: Path) -> None:
    """They are written into the picture, as JSON."""
    given = {"seed": np.int64(3), "steps": np.int32(1), "guidance": np.float32(2.5)}
    result = engine.generate("a fox", size=Size(np.int64(32), 32), **given)
    assert result.seeds == (3,)
    assert json.loads(result.images[0].info["workflow"])
    workflow = Workflow.load(file).set("KSampler.steps", np.int64(1)).with_seed(torch.tensor(9))
    assert engine.run(workflow).seeds == (9,)


@pytest.mark.parametrize(
    ("loras", "asked"),
    [
        (None, ()),
        ({"x.safetensors": 0.3}, (("x.safetensors", 0.3),)),
        (["a.safetensors", ("b.safetensors", -1)], (("a.safetensors", 1.0), ("b.safetensors", -1))),
    ],
)
def test_loras_keep_their_strength(loras: Any, asked: tuple[tuple[str, float], ...]) -> None:
    assert _loras(loras) == asked


@pytest.mark.parametrize("loras", [5, [Path("x.safetensors")], [("x.safetensors",)], {"x.safetensors": "1"}])
def test_what_is_no_lora_is_told(engine: Engine, loras: Any) -> None:
    with pytest.raises(UsoflowError, match="is not a LoRA") as error:
        engine.workflow("a fox", loras=loras)
    assert error.value.code == "request_invalid"


@pytest.mark.parametrize("loras", ["x.safetensors", ("x.safetensors", 0.5), ["x.safetensors"]])
def test_one_lora_needs_no_list(engine: Engine, loras: Any) -> None:
    with pytest.raises(UsoflowError, match=r"'x\.safetensors' not in") as error:
        engine.generate("a fox", loras=loras)
    assert error.value.code == "model_missing"


def test_the_template_has_the_models_that_are_there(tmp_path: Path) -> None:
    """As the served editor has it; other templates are as they are."""
    with Engine(models=POCKET_MODELS, output=tmp_path, device="cpu") as engine:
        workflow = engine.load("template:flux1_dev_uso_reference_image_gen")
        inputs = [node.inputs for node in workflow.prompt.nodes.values()]
        assert {"usoflow-pocket.safetensors"} == {
            given["ckpt_name"] for given in inputs if "ckpt_name" in given
        }
        assert {given["width"] for given in inputs if "width" in given} == {128}
        assert any("small pocket models are used" in warning for warning in workflow.warnings)
        assert engine.load(Path("template:flux1_dev_uso_reference_image_gen")) == workflow
        assert engine.load("template:flux_dev_checkpoint_example").warnings == ()


def test_a_run_can_be_stopped(engine: Engine, file: Path) -> None:
    cancellation = Cancellation()

    def stop(event: object) -> None:
        if isinstance(event, NodeProgress):
            cancellation.set()

    with pytest.raises(UsoflowError) as caught:
        engine.run(file, progress=stop, cancellation=cancellation)
    assert caught.value.code == "cancelled"
    assert engine.run(file).paths  # and the next one runs


def test_generating_from_files_and_memory_is_the_same(engine: Engine, small_models: Path) -> None:
    pictures = small_models.parent / "input"
    options: dict[str, Any] = {"size": (64, 64), "steps": 2, "seed": 3, "subject_size": 32}
    from_files = engine.generate(
        "a cat", subject=pictures / "subject.png", style=[pictures / "style.png"], **options
    )
    memory = {name: Image.open(pictures / f"{name}.png") for name in ("subject", "style")}
    from_memory = engine.generate("a cat", subject=memory["subject"], style=memory["style"], **options)
    assert np.array_equal(np.asarray(from_files.images[0]), np.asarray(from_memory.images[0]))
    assert "workflow" in from_files.images[0].info
    again = engine.generate("a cat", subject=memory["subject"], style=memory["style"], **options)
    assert again.workflow.pictures == from_memory.workflow.pictures  # which are written once
    assert Workflow.load(from_files.paths[0]).to_prompt() == from_files.workflow.to_prompt()


def test_generating_in_one_call_draws_a_seed(small_models: Path, tmp_path: Path) -> None:
    result = usoflow.generate(
        "a cat", models=small_models, output=tmp_path, size=(32, 32), steps=1, device="cpu", dtype="fp32"
    )
    assert 0 <= result.seeds[0] < 2**32
    assert result.images[0].size == (32, 32)


def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with Engine(models=tmp_path) as engine, pytest.raises(UsoflowError) as caught:
        engine.check("template:flux1_dev_uso_reference_image_gen")
    assert caught.value.code == "model_missing"
    assert "huggingface.co" in caught.value.remedy


def test_the_package_has_no_other_names() -> None:
    assert set(usoflow.__all__) - {"__version__"} <= {
        name for name in usoflow.__all__ if getattr(usoflow, name)
    }
    with pytest.raises(AttributeError):
        _ = usoflow.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("loras", "expected"),
    [
        ("x.safetensors", {("x.safetensors", 1.0)}),
        (("x.safetensors", 0.5), {("x.safetensors", 0.5)}),
        (["x.safetensors", ("y.safetensors", 0)], {("x.safetensors", 1.0), ("y.safetensors", 0)}),
    ],
)
def test_strengths_of_loras(engine: Engine, loras: Any, expected: Any) -> None:
    nodes = engine.workflow("a fox", loras=loras).prompt.nodes.values()
    given = [node.inputs for node in nodes if node.class_type == "LoraLoaderModelOnly"]
    assert expected <= {(inputs["lora_name"], inputs["strength_model"]) for inputs in given}


def test_a_seed_of_zero_is_a_seed(engine: Engine) -> None:
    assert engine.workflow("a fox", seed=0).seeds == (0,)


def test_an_engine_that_starts_removes_old_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no server ever runs nobody else would."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path)
    old = tmp_path / "temp" / "preview_a_00001_.png"
    old.parent.mkdir()
    old.touch()
    os.utime(old, (0, 0))
    with Engine(device="cpu") as engine:
        engine.start()
    assert not old.exists()


@pytest.mark.parametrize(
    "given", [b"\x89PNG", 5, "", [b"x"], object(), np.zeros((8, 8, 3)), [torch.ones(8, 8)]]
)
def test_what_is_no_picture_is_told(engine: Engine, given: Any) -> None:
    with pytest.raises(UsoflowError, match="A picture is") as caught:
        engine.workflow("a fox", subject=given)
    assert caught.value.code == "request_invalid"


@pytest.mark.parametrize("asked", [{"prompt": None}, {"prompt": "x", "steps": None}])
def test_what_a_request_lacks_is_told(engine: Engine, asked: dict[str, Any]) -> None:
    """A service hands on what its JSON has."""
    with pytest.raises(UsoflowError) as caught:
        engine.workflow(**asked)
    assert caught.value.code == "request_invalid"


def test_paths_of_results_do_not_depend_on_the_current_folder(
    small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Engine(models=small_models, output="here", device="cpu", dtype="fp32") as engine:
        result = engine.run(small.text_to_image())
    monkeypatch.chdir("/")
    assert result.paths[0].is_absolute()
    assert result.images[0].size

"""`usoflow generate` on small models."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shell import Done, usoflow
from usoflow.api.checking import Job
from usoflow.api.engine import Engine
from usoflow.api.official import LAYOUT_NOTE
from usoflow.api.result import Result
from usoflow.api.workflow import Workflow
from usoflow.cli import report
from usoflow.errors import UsoflowError
from usoflow.nodes import registry
from usoflow.workflow import metadata
from usoflow.workflow.loading import load_json
from usoflow.workflow.prompt import PromptNode

SMALL_SUBJECT = "--subject-size=32"  # which is refused where there is no subject


@pytest.fixture
def small_options(small_models: Path, tmp_path: Path) -> list[str]:
    return [
        "--models", str(small_models), "--output", str(tmp_path / "out"), "--device=cpu", "--dtype=fp32",
        "--size=32x32", "--steps=1",
    ]  # fmt: skip


@pytest.fixture
def pictures(small_models: Path) -> Path:
    return small_models.parent / "input"


def record(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_line_of_text(small_options: list[str], tmp_path: Path) -> None:
    done = usoflow("generate", "a cat", "--seed=7", *small_options)
    assert done.code == 0, done.err
    path = Path(done.out.splitlines()[0])
    assert path.parent == tmp_path / "out"
    assert "seed 7" in done.out
    assert Workflow.load(path).seeds == (7,)


def test_count_shares_encodings_and_makes_a_sheet(small_options: list[str], pictures: Path) -> None:
    done = usoflow(
        "generate", "a cat", f"--subject={pictures / 'subject.png'}", "--seed=7", "--count=3", "--sheet",
        "--json", *small_options, SMALL_SUBJECT,
    )  # fmt: skip
    found = record(done)
    assert found["seeds"] == [7, 8, 9]
    assert len(found["images"]) == 3
    ran = [{node["class_type"] for node in run["nodes"]} for run in found["runs"]]
    assert "CLIPTextEncode" in ran[0]
    assert ran[1] == ran[2] == {"KSampler", "VAEDecode", "SaveImage"}
    with Image.open(found["sheet"]) as sheet:
        assert sheet.size == (2 * 264 + 8, 2 * (256 + 26) + 8)  # enlarged eightfold


def test_a_sweep_is_a_grid_of_every_combination(small_options: list[str], pictures: Path) -> None:
    done = usoflow(
        "generate", "a cat", f"--subject={pictures / 'subject.png'}", "--sweep=steps=1,2",
        "--sweep=subject-size=16,32,48", "--seed=1", "--json", *small_options,
    )  # fmt: skip
    found = record(done)
    prompts = [Workflow.load(path).to_prompt() for path in found["images"]]
    tried = [(p["112:31"]["inputs"]["steps"], p["112:109"]["inputs"]["largest_size"]) for p in prompts]
    assert tried == [(1, 16), (1, 32), (1, 48), (2, 16), (2, 32), (2, 48)]
    assert [run["label"] for run in found["runs"]][1] == "steps 1 · subject-size 32 · seed 1"
    assert Path(found["sheet"]).is_file()


def test_several_words_after_an_option(small_options: list[str], pictures: Path) -> None:
    """As the command line is documented: subjects, styles and sweeps one behind the other."""
    subject, style = pictures / "subject.png", pictures / "style.png"
    done = usoflow(
        "generate", "a cat", "--subject", subject, style, "--style", style, subject, style, "--easycache",
        "--sweep", "steps=1,2", "subject-size=16,32,48", "--seed=1", "--json", *small_options,
    )  # fmt: skip
    found = record(done)
    workflows = [Workflow.load(path) for path in found["images"]]
    types = [node.class_type for node in workflows[0].prompt.nodes.values()]
    assert (types.count("ReferenceLatent"), types.count("USOStyleReference")) == (2, 3)
    assert {n.inputs["reuse_threshold"] for n in of_type(workflows[0], "EasyCache")} == {0.2}
    tried = [
        (n.inputs["steps"], m.inputs["largest_size"])
        for workflow in workflows
        for n in of_type(workflow, "KSampler")
        for m in of_type(workflow, "ImageScaleToMaxDimension")
    ]
    assert tried == [(n, m) for n in (1, 2) for m in (16, 16, 32, 32, 48, 48)]
    with Image.open(found["sheet"]) as sheet:
        assert sheet.width == 3 * 264 + 8  # a row for each number of steps


def of_type(workflow: Workflow, class_type: str) -> list[PromptNode]:
    return [node for node in workflow.prompt.nodes.values() if node.class_type == class_type]


def test_each_subject_and_each_style_counts(small_options: list[str], pictures: Path) -> None:
    subject, style = pictures / "subject.png", pictures / "style.png"
    seen = set()
    for words in (
        ["--subject", subject],
        ["--subject", subject, style],
        ["--subject", style, subject],
        ["--subject", subject, "--style", style, style],
        ["--subject", subject, "--style", style, style, subject],
        ["--style", style, style, subject],
    ):
        small = [SMALL_SUBJECT] if "--subject" in words else []
        done = usoflow("generate", "a cat", *words, "--seed=1", "--json", *small_options, *small)
        with Image.open(record(done)["images"][0]) as picture:
            seen.add(picture.tobytes())
    assert len(seen) == 6


def test_the_graph_in_the_picture_gives_the_prompt_in_the_picture(
    small_options: list[str], pictures: Path
) -> None:
    references = ["--subject", pictures / "subject.png", pictures / "style.png"]
    references += ["--style", *[pictures / "style.png"] * 3, SMALL_SUBJECT]
    options = ["--easycache", "0.3", "--lora", "uso-flux1-dit-lora-v1.safetensors:0.3", "--keep-size"]
    done = usoflow("generate", "a cat", *references, *options, "--guidance=2", "--json", *small_options)
    texts = metadata.read(Path(record(done)["images"][0]).read_bytes())
    flattened = load_json(json.loads(texts["workflow"]), registry()).prompt.to_json()
    assert flattened == json.loads(texts["prompt"])


def test_a_model_of_another_name(small_models: Path, small_options: list[str], tmp_path: Path) -> None:
    """If it is the only one it is taken, and told; else what the error of a missing file advises, works."""
    models = tmp_path / "models"
    shutil.copytree(small_models, models)
    mine = models / "checkpoints" / "mine.safetensors"
    (models / "checkpoints" / "flux1-dev-fp8.safetensors").rename(mine)
    options = [*small_options, "--models", str(models)]
    done = usoflow("generate", "a cat", *options)
    assert done.code == 0, done.err
    assert "warning: Not all files of the tutorial are there. Taken: mine.safetensors for flux1-" in done.err
    shutil.copy(mine, mine.with_name("other.safetensors"))
    refused = usoflow("generate", "a cat", *options)
    assert refused.code == 4
    (advice,) = re.findall(r"--set (\S+)=NAME", refused.err)
    done = usoflow("generate", "a cat", *options, "--set", f"{advice}=mine.safetensors", "KSampler.cfg=1.5")
    assert done.code == 0, done.err
    workflow = Workflow.load(done.out.splitlines()[0])
    assert [node.inputs["cfg"] for node in of_type(workflow, "KSampler")] == [1.5]


def test_what_is_done_is_told_before_the_next(small_models: Path, pictures: Path, tmp_path: Path) -> None:
    """A thousand are asked for and Ctrl+C comes after the first, which has been named by then."""
    script = "import sys, usoflow.cli.main as m; sys.exit(m.main())"
    command = [sys.executable, "-c", script, "generate", "a cat", "--count=1000", "--size=32x32", "--steps=1"]
    command += ["--models", str(small_models), "--output", str(tmp_path), "--device=cpu", "--dtype=fp32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        first = running.stdout.readline().strip()
        running.send_signal(signal.SIGINT)
        running.communicate()
    assert Path(first).is_file()
    assert running.returncode == 130


@pytest.mark.parametrize("when", ["while it runs", "when it is done"])
@pytest.mark.parametrize("as_json", [False, True])
def test_after_ctrl_c_all_that_is_done_is_told_once(
    small_options: list[str], monkeypatch: pytest.MonkeyPatch, when: str, as_json: bool
) -> None:
    """A record, or its lines, and a sheet; also where the run could not notice any more."""
    run, done_before = Engine.run, []

    def stopped_at_the_third(engine: Engine, job: Job, **more: Any) -> Result:
        if len(done_before) == 2 and when == "while it runs":
            signal.raise_signal(signal.SIGINT)
        result = run(engine, job, **more)
        done_before.append(result)
        if len(done_before) == 2 and when != "while it runs":
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(Engine, "run", stopped_at_the_third)
    options = ["--count=1000", "--sheet", *(["--json"] if as_json else [])]
    done = usoflow("generate", "a cat", *options, *small_options)
    assert done.code == 130
    assert len(done_before) == 2
    if as_json:
        told = json.loads(done.out)
        assert told["error"]["code"] == "cancelled"
        images, sheet = told["images"], told["sheet"]
    else:
        images = re.findall(r"^(?!sheet)(\S+\.png)$", done.out, re.MULTILINE)
        (sheet,) = re.findall(r"^sheet: (.+)$", done.out, re.MULTILINE)
        assert done.err.count("stopped") == 1
    assert list(map(Path, images)) == [path for result in done_before for path in result.paths]
    with Image.open(sheet) as found:
        assert found.width > 2 * 32


def test_a_failure_in_the_middle_leaves_a_sheet(
    small_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seeds = Engine.run, []

    def fails_at_the_third(engine: Engine, job: Job, **more: Any) -> Result:
        seeds.append(job.workflow.seeds)
        if len(seeds) == 3:
            raise UsoflowError("out_of_memory", "Memory ran out.")
        return run(engine, job, **more)

    monkeypatch.setattr(Engine, "run", fails_at_the_third)
    done = usoflow("generate", "a cat", "--sweep", "steps=1,2,3", *small_options)
    assert done.code == 6
    assert "Memory ran out." in done.err
    (line,) = re.findall(r"^sheet: (.+)$", done.out, re.MULTILINE)
    assert Path(line).is_file()


@pytest.mark.parametrize(("count", "failures"), [(1, 0), (2, 1)])
def test_only_a_second_picture_is_compiled(small_options: list[str], count: int, failures: int) -> None:
    """Where no compiler is: what would be compiled is said not to be."""
    script = "import sys, usoflow.cli.main as m; sys.exit(m.main())"
    command = [sys.executable, "-c", script, "generate", "a cat", "--compile", f"--count={count}"]
    done = subprocess.run(
        [*command, *small_options],
        env=os.environ | {"CXX": "/no/such/compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The compiler failed") == failures


def test_an_empty_prompt_is_explained(small_options: list[str], pictures: Path) -> None:
    references = [f"--subject={pictures / 'subject.png'}", f"--style={pictures / 'style.png'}", SMALL_SUBJECT]
    assert LAYOUT_NOTE in usoflow("generate", "", *references, *small_options).out


def test_keeping_proportions_and_saving_the_workflow(
    small_options: list[str], pictures: Path, tmp_path: Path
) -> None:
    done = usoflow(
        "generate", "a cat", f"--subject={pictures / 'subject.png'}", "--keep-size", "--easycache=0.3",
        "--lora=uso-flux1-dit-lora-v1.safetensors:-0.5", f"--save-workflow={tmp_path / 'w.json'}", "--json",
        *small_options, SMALL_SUBJECT,
    )  # fmt: skip
    with Image.open(record(done)["images"][0]) as picture:
        assert picture.size == (48, 32)
    saved = json.loads((tmp_path / "w.json").read_text())
    assert "nodes" in saved  # the UI graph
    loras = [n for n in Workflow.load(tmp_path / "w.json").to_prompt().values() if "lora_name" in n["inputs"]]
    assert [node["inputs"]["strength_model"] for node in loras] == [1, -0.5]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--size=big"], 2, "--size"),
        (["--size=1000x1000"], 2, "multiples of 16"),
        (["--sweep=colour=red"], 2, "can be swept"),
        (["--sweep=subject-size=64,128"], 2, "subject-size needs a subject"),
        (["--subject-size=64"], 2, "subject-size needs a subject"),
        (["--sweep=steps=few"], 2, "not all of 'few' are values of steps"),
        (["--sweep=steps"], 2, "has no values"),
        (["--keep-size"], 2, "keep-size needs a subject"),
        (["--subject=none.png"], 5, "none.png"),
        (["--subject=https://example.com/a.png"], 5, "download the picture"),
        (["--lora=none.safetensors"], 4, "none.safetensors"),
        (["--lora=none.safetensors:much"], 2, "the strength 'much' is not a number"),
        (["--lora=odd:none.safetensors"], 4, "odd:none.safetensors"),
        ([f"--seed={2**64 - 1}", "--count=2"], 2, f"Seeds end at {2**64 - 1}"),
        ([f"--sweep=seed={2**64}"], 2, f"Seeds end at {2**64 - 1}"),
        (["--sweep", "steps=2,3", "steps=4"], 2, "swept once"),
        (["--sweep=steps=2,2"], 2, "would be the same"),
        (["--sweep=steps=1,2", "--set=KSampler.steps=1"], 2, "would change what is swept"),
        (["--sweep=steps=1", "--set=KSampler.steps=2"], 2, "would change what is swept"),
        (["--sweep=size=32x32", "--set=113.width=48"], 2, "would change what is swept"),
        (["--count=3", "--seed=1", "--set=KSampler.seed=5"], 2, "by --count, the seed"),
        (["--count=2", "--sweep=seed=1,2"], 2, "would be the same"),
    ],
)
def test_mistakes(small_options: list[str], arguments: list[str], code: int, said: str) -> None:
    done = usoflow("generate", "a cat", *small_options, *arguments)
    assert done.code == code
    assert said in done.err


def test_labels_tell_what_was_run(small_options: list[str]) -> None:
    done = usoflow(
        "generate", "a cat", "--set=KSampler.seed=77", "--sweep=guidance=2", "--json", *small_options
    )
    assert [run["label"] for run in record(done)["runs"]] == ["guidance 2.0 · seed 77"]


def test_an_older_sheet_stays(small_options: list[str], tmp_path: Path) -> None:
    """Where pictures were moved away their numbers begin anew."""
    (tmp_path / "out").mkdir()
    older = tmp_path / "out" / "sheet_of_ComfyUI_00001_.png"
    older.write_bytes(b"older")
    found = record(usoflow("generate", "a cat", "--seed=1", "--sheet", "--json", *small_options))
    assert older.read_bytes() == b"older"
    with Image.open(found["sheet"]) as sheet:
        assert sheet.size == (264 + 8, 256 + 26 + 8)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_long_prompt_that_ends_as_a_picture_does(small_options: list[str]) -> None:
    """No file can have such a name."""
    prompt = "a cat, " * 40 + "as in cat.png"
    assert usoflow("generate", prompt, *small_options).code == 0


def test_a_prompt_without_quotes(small_options: list[str]) -> None:
    done = usoflow("generate", "a", "red", "fox", *small_options)
    assert done.code == 2
    assert 'usoflow generate "a red fox"' in done.err


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1", "TERM": "dumb"}], ids=["none", "dumb"])
def test_without_a_terminal_that_draws_a_long_run_says_how_far_it_is(
    small_options: list[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(report, "SAID_EVERY", 0.0)
    options = [*small_options, "--set=KSampler.steps=2"]
    done = usoflow("generate", "a cat", *options)
    assert re.findall(r"^KSampler (\d)/2, [\d.]+ s/step$", done.err, re.MULTILINE) == ["1", "2"]
    assert usoflow("generate", "a cat", *options, "--json").err == ""


def test_a_picture_where_the_prompt_belongs(small_options: list[str], pictures: Path) -> None:
    done = usoflow("generate", "--style", pictures / "style.png", pictures / "subject.png", *small_options)
    assert done.code == 2
    assert "where the prompt belongs" in done.err


def test_help_is_no_picture() -> None:
    done = usoflow("generate", "a cat", "--subject", "a.png", "-h")
    assert done.code == 0
    assert "Usage" in done.out


def test_json_tells_what_is_done_when_the_sheet_fails(
    small_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise UsoflowError("save_failed", "no space")

    monkeypatch.setattr("usoflow.api.sheet.contact_sheet", full)
    done = usoflow("generate", "a cat", "--seed=1", "--sheet", "--json", *small_options)
    said = json.loads(done.out)
    assert (done.code, said["error"]["code"], len(said["images"])) == (6, "save_failed", 1)


def test_json_tells_what_is_done_when_a_later_picture_fails(
    small_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from usoflow.cli import generate

    calls = []

    def second_fails(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise UsoflowError("out_of_memory", "it was too much")
        return execute(*given, **more)

    execute = generate.execute
    monkeypatch.setattr(generate, "execute", second_fails)
    done = usoflow("generate", "a cat", "--count", "3", "--json", *small_options)
    said = json.loads(done.out)
    assert (done.code, said["error"]["code"]) == (6, "out_of_memory")
    assert [Path(path).is_file() for path in said["images"]] == [True]
    assert len(said["seeds"]) == 1


def test_an_output_that_cannot_be_written_is_told_before_anything_is_computed(
    small_options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = usoflow("generate", "a cat", *small_options, "--output", tmp_path / "file" / "folder")
    assert (done.code, done.out) == (2, "")
    assert "--output" in done.err
    assert "KSampler" not in done.err


def test_a_console_without_the_sign() -> None:
    """≈ in a code page of Windows."""
    done = subprocess.run(
        [sys.executable, "-m", "usoflow", "models"],
        env=os.environ | {"PYTHONIOENCODING": "cp1252:strict"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr

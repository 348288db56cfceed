"""`usoflow generate`: a prompt, pictures of a subject or style, and out comes a picture."""

from __future__ import annotations

import io
import itertools
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from usoflow.cli import report
from usoflow.cli.options import (
    AsJson,
    Compiled,
    Device,
    Dtype,
    InDtype,
    Models,
    OnDevice,
    Output,
    Vram,
    path,
)
from usoflow.cli.run import execute, stopped_by_interrupt
from usoflow.cli.words import SeveralWords
from usoflow.errors import UsoflowError
from usoflow.settings import IMAGE_SUFFIXES, MODEL_SUFFIXES

if TYPE_CHECKING:
    from usoflow.api.engine import Engine
    from usoflow.api.official import Request
    from usoflow.api.result import Result
    from usoflow.api.workflow import Workflow


SEEDS = 2**64


class Generate(SeveralWords):
    """The command line of `usoflow generate`."""

    bare = MappingProxyType({"--easycache": "0.2"})  # the default of the EasyCache node

    def too_many(self, ctx: Any) -> str:
        """A prompt without quotes is many words."""
        words = " ".join([ctx.params["prompt"], *ctx.args])
        return f'Too many words. A prompt is put in quotes: usoflow generate "{words}"'


Prompt = Annotated[
    str,
    typer.Argument(
        metavar="PROMPT", help='What the picture shows; "" with a subject and a style keeps the layout.'
    ),
]
Subjects = Annotated[
    list[Path] | None, typer.Option(parser=path, metavar="IMG ...", help="Pictures whose subjects are kept.")
]
Styles = Annotated[
    list[Path] | None, typer.Option(parser=path, metavar="IMG ...", help="Pictures whose style is taken.")
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WxH", help="Of the picture, as 1024x768; else what the model was trained for."),
]
Steps = Annotated[int, typer.Option(help="Of the sampler: more are slower and finer.", min=1, max=10000)]
Guidance = Annotated[
    float,
    typer.Option(
        help="How closely the prompt is followed; 2 to 3 looks more like a photo.", min=0.0, max=100.0
    ),
]
Seed = Annotated[int | None, typer.Option(help="Random if not given.", min=0, max=SEEDS - 1)]
Count = Annotated[int, typer.Option(help="Pictures, of consecutive seeds.", min=1, max=1000)]
SubjectSize = Annotated[
    int | None,
    typer.Option(
        help="Longer side that the subject's picture is scaled to; 512, or less for small models.",
        min=16,
        max=16384,
    ),
]
KeepSize = Annotated[
    bool, typer.Option("--keep-size", help="Take the proportions of the (first) subject's picture.")
]
EasyCache = Annotated[
    float | None,
    typer.Option(
        metavar="[NUMBER]", help="Skip steps that change less than this; 0.2 without a number.", min=0, max=3
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:STRENGTH] ...", help="Further LoRAs, of the loras folder."),
]
Sheet = Annotated[bool, typer.Option("--sheet", help="Also write all pictures on one sheet.")]
Sweep = Annotated[
    list[str] | None,
    typer.Option(metavar="OPTION=V,V,... ...", help="Try these values; writes a sheet with labels."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NODE.INPUT=VALUE ...",
        help="Set any other input of the workflow; NODE is an id, title or type.",
    ),
]
SaveWorkflow = Annotated[
    Path | None, typer.Option(parser=path, help="Write the workflow of the first picture.")
]


def generate(
    prompt: Prompt,
    subject: Subjects = None,
    style: Styles = None,
    size: Size = None,
    steps: Steps = 20,
    guidance: Guidance = 3.5,
    seed: Seed = None,
    count: Count = 1,
    subject_size: SubjectSize = None,
    keep_size: KeepSize = False,
    easycache: EasyCache = None,
    lora: Loras = None,
    sheet: Sheet = False,
    sweep: Sweep = None,
    assignments: Assignments = None,
    save_workflow: SaveWorkflow = None,
    output: Output = None,
    models: Models = None,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.auto,
    vram: Vram = None,
    compiled: Compiled = None,
    as_json: AsJson = False,
) -> None:
    """Generate pictures with the official USO workflow.

    With the prompt first, options that show ... take several words: --style one.png two.png.
    """
    from usoflow.api.engine import Engine
    from usoflow.api.official import RANDOM_SEEDS, Request

    request = Request(
        prompt,
        subjects=tuple(subject or ()),
        styles=tuple(style or ()),
        size=None if size is None else _size(size),
        steps=steps,
        guidance=guidance,
        seed=secrets.randbelow(RANDOM_SEEDS) if seed is None else seed,
        subject_size=subject_size,
        keep_size=keep_size,
        easycache=easycache,
        loras=tuple(_lora(item) for item in lora or ()),
    )
    sweeps = _sweeps(sweep or [])
    _refuse_picture(prompt)
    wanted = list(_variants(request, count, sweeps))
    engine = Engine(
        models=models, output=output, device=device.value, dtype=dtype.value, vram=vram, compiled=compiled
    )
    told = [name for name, _ in sweeps] + ["seed"] * (count > 1)
    fixed = {name for option in told for name in _SWEPT[option].inputs}
    workflows = _workflows(engine, wanted, assignments or [], fixed)
    columns = len(sweeps[-1][1]) * count if sweeps else None
    results: list[Result] = []
    written, stopped = None, None
    try:
        for result in _run(engine, workflows, save_workflow, quiet=as_json):
            results.append(result)
            if not as_json:  # at once: what is done is not lost with what fails later
                print(report.as_text(result), flush=True)
    except UsoflowError as error:
        if not results:
            raise
        stopped = error
    try:
        written = _write_sheet(wanted, results, columns) if sheet or sweeps else None
    except UsoflowError as error:
        stopped = stopped or error
    if as_json:
        failed = {"error": report.error_record(stopped)} if stopped else {}
        print(json.dumps(_record(request, wanted, results, written) | failed))
        sys.exit(stopped.exit_code if stopped else 0)  # all is told
    sheets = [f"sheet: {report.from_here(written)}"] if written else []
    for line in sheets + [f"note: {note}" for note in request.notes]:
        print(line)
    if stopped:
        raise stopped


def _refuse_picture(prompt: str) -> None:
    if Path(prompt).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(prompt):
        raise UsoflowError(
            "request_invalid", f"{prompt} is a picture, where the prompt belongs.",
            remedy='The prompt comes first, "" for none: usoflow generate "a cat" --style a.png b.png',
        )  # fmt: skip


@dataclass(frozen=True)
class _Wanted:
    """One picture: what is asked for, and which of the swept values these are."""

    request: Request
    values: tuple[str, ...]

    def label(self, result: Result) -> str:
        """What tells the picture from the others; its seed is that of what was run."""
        from usoflow.api.sheet import SEPARATOR

        return SEPARATOR.join([*self.values, *(f"seed {seed}" for seed in result.seeds)])


def _workflows(
    engine: Engine, wanted: Sequence[_Wanted], assignments: Sequence[str], fixed: Set[str]
) -> list[Workflow]:
    """The workflow of each picture; `fixed` are inputs that labels tell, which no assignment may change."""
    from usoflow.api.official import build

    files = engine.model_files()
    workflows = [build(item.request, files) for item in wanted]
    for assignment in assignments:
        assigned = [workflow.assign(assignment) for workflow in workflows]
        if any(_changes(*pair, fixed) for pair in zip(workflows, assigned, strict=True)):
            raise UsoflowError(
                "request_invalid", f"--set {assignment} would change what is swept or, by --count, the seed.",
                remedy="Leave out the one or the other.",
            )  # fmt: skip
        workflows = assigned
    told = {json.dumps(workflow.to_prompt(), sort_keys=True) for workflow in workflows}
    if len(told) < len(workflows):
        raise UsoflowError(
            "request_invalid",
            "Some of the pictures would be the same.",
            remedy="Sweep each value once, and the seed or its --count.",
        )
    return workflows


def _changes(before: Workflow, after: Workflow, inputs: Set[str]) -> bool:
    """Whether an input of one of these names has another value."""
    one, other = (
        [(key, name, node.inputs.get(name)) for key, node in workflow.prompt.nodes.items() for name in inputs]
        for workflow in (before, after)
    )
    return one != other


def _run(
    engine: Engine, workflows: Sequence[Workflow], save_workflow: Path | None, *, quiet: bool
) -> Iterator[Result]:
    """All of them on the same models; what can be refused is refused before the first is begun.

    Ctrl+C stops at whatever is done, also between two of them.
    """
    jobs = [engine.check(workflow) for workflow in workflows]
    report.warn(dict.fromkeys(warning for job in jobs for warning in job.warnings))
    if save_workflow is not None:
        workflows[0].save(save_workflow)
    with stopped_by_interrupt() as cancellation:
        for job in jobs:
            cancellation.check()
            yield execute(engine, job, cancellation, quiet=quiet)


def _variants(request: Request, count: int, sweeps: Sequence[tuple[str, Sequence[Any]]]) -> Iterator[_Wanted]:
    """Every combination of the swept values, for each seed."""
    for values in itertools.product(*(values for _, values in sweeps)):
        chosen = {name: value for (name, _), value in zip(sweeps, values, strict=True)}
        swept = replace(request, **{name.replace("-", "_"): value for name, value in chosen.items()})
        last = swept.seed + count - 1
        if last >= SEEDS:
            raise UsoflowError("request_invalid", f"Seeds end at {SEEDS - 1}; {last} is asked for.")
        told = tuple(f"{name} {_in_words(value)}" for name, value in chosen.items() if name != "seed")
        for seed in range(swept.seed, swept.seed + count):
            yield _Wanted(replace(swept, seed=seed), told)


def _in_words(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _record(
    request: Request, wanted: Sequence[_Wanted], results: Sequence[Result], sheet: Path | None = None
) -> dict[str, Any]:
    return {
        "images": [str(path) for result in results for path in result.paths],
        "seeds": [seed for result in results for seed in result.seeds],
        "sheet": None if sheet is None else str(sheet),
        "notes": list(request.notes),
        "runs": [
            {"label": item.label(result)} | report.as_record(result)
            for item, result in zip(wanted, results, strict=False)  # fewer, where something went wrong
        ],
    }


def _write_sheet(wanted: Sequence[_Wanted], results: Sequence[Result], columns: int | None) -> Path:
    from PIL import Image

    from usoflow.api.saving import save
    from usoflow.api.sheet import contact_sheet

    labelled = (
        (item.label(result), Image.open(path))
        for item, result in zip(wanted, results, strict=False)  # fewer, as above
        for path in result.paths
    )
    path, buffer = _sheet_path(results[0].paths[0]), io.BytesIO()
    try:
        contact_sheet(labelled, columns=columns).save(buffer, "PNG")
        save(path, buffer.getvalue())
    except (UsoflowError, OSError) as error:  # a full disk, a picture that somebody has moved
        raise UsoflowError("save_failed", f"The sheet cannot be made: {error}") from None
    return path


def _sheet_path(picture: Path) -> Path:
    """A free name by that of the first picture, which is nobody else's.

    Where older pictures were taken away their numbers are used again, and their sheet may still be there.
    """
    numbers = itertools.chain([""], itertools.count(2))
    paths = (picture.with_name(f"sheet_of_{picture.stem}{number}.png") for number in numbers)
    return next(path for path in paths if not os.path.lexists(path))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsoflowError("request_invalid", f"--size {text!r} is not WxH, as 1024x768.")
    return int(width), int(height)


def _lora(text: str) -> tuple[str, float]:
    """A file name may hold a colon itself: what follows the last one counts if it is a number."""
    name, _, strength = text.rpartition(":")
    try:
        return (name, float(strength)) if name else (text, 1.0)
    except ValueError:
        if name.endswith(MODEL_SUFFIXES):
            what = f"--lora {text!r}: the strength {strength!r} is not a number, as 0.8 in {name}:0.8."
            raise UsoflowError("request_invalid", what) from None
        return text, 1.0


@dataclass(frozen=True)
class _Swept:
    """How a value is read, and which inputs of the workflow get it."""

    read: Callable[[str], Any]
    inputs: tuple[str, ...]


_SWEPT: Mapping[str, _Swept] = MappingProxyType(
    {
        "steps": _Swept(int, ("steps",)),
        "guidance": _Swept(float, ("guidance",)),
        "seed": _Swept(int, ("seed",)),
        "subject-size": _Swept(int, ("largest_size",)),
        "easycache": _Swept(float, ("reuse_threshold",)),
        "size": _Swept(_size, ("width", "height")),
    }
)


def _sweeps(texts: Sequence[str]) -> list[tuple[str, list[Any]]]:
    sweeps = [_sweep(text) for text in texts]
    if len({name for name, _ in sweeps}) < len(sweeps):
        raise UsoflowError("request_invalid", "An option can be swept once: --sweep steps=4,8,20.")
    return sweeps


def _sweep(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not (equals and values):
        raise UsoflowError("request_invalid", f"--sweep {text!r} has no values: --sweep steps=4,8,20.")
    if name not in _SWEPT:
        raise UsoflowError("request_invalid", f"--sweep {text!r}: only {', '.join(_SWEPT)} can be swept.")
    try:
        return name, [_SWEPT[name].read(value) for value in values.split(",")]
    except ValueError:
        raise UsoflowError(
            "request_invalid", f"--sweep {text!r}: not all of {values!r} are values of {name}."
        ) from None

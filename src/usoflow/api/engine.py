"""The engine: runs workflows one after another on models that stay loaded, from any thread.

with Engine(models="~/ComfyUI") as engine:
    result = engine.generate("a cat in the rain", subject="cat.png")
    result.images[0].show()
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypedDict, Unpack, cast

from usoflow.api.at_hand import ModelFiles, at_hand
from usoflow.api.checking import Job, check
from usoflow.api.official import RANDOM_SEEDS, TEMPLATE, Request, adapted, build
from usoflow.api.result import Result
from usoflow.api.workflow import Workflow, WorkflowSource, check_picture, plain
from usoflow.durable import sha256
from usoflow.errors import UsoflowError
from usoflow.settings import Folders, bytes_of, expanded, find_folders, temp_folder
from usoflow.workflow.loading import TEMPLATE as TEMPLATE_PREFIX

if TYPE_CHECKING:
    from PIL.Image import Image

    from usoflow.execution.executor import Executor, RunResult
    from usoflow.execution.progress import Cancellation, Event
    from usoflow.models.placement import Placement
    from usoflow.schema.node import NodeRegistry

    Picture = str | Path | Image
    Lora = str | tuple[str, float]
    Loras = Mapping[str, float] | Sequence[Lora] | Lora | None

GIVE_AGAIN: Final = "Give it again: workflow.with_picture(NODE, FILE). One from memory went with its engine."
KEPT_PICTURES: Final = 256  # from memory, as files: a service makes no end of them
WAITED_SECONDS: Final = 0.1  # between two looks whether a run that waits for another is to stop


class Asked(TypedDict, total=False):
    """What `Engine.workflow` can be asked for besides the prompt."""

    subject: Sequence[Picture] | Picture | None
    style: Sequence[Picture] | Picture | None
    size: tuple[int, int] | None
    steps: int
    guidance: float
    seed: int | None
    subject_size: int | None
    keep_size: bool
    easycache: float | None
    loras: Loras


class Engine:
    """Runs workflows. As a context manager it gives the memory of the models back at the end.

    Args:
        models: a ComfyUI folder or its models folder; default USOFLOW_MODELS, else the user's data folder.
        inputs: where pictures are that a workflow names; default `input` here and in ComfyUI folders.
        output: where pictures are written; default USOFLOW_OUTPUT, else `output` here.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: of the transformer: "auto", "bf16", "fp16" or "fp32".
        vram: memory for the transformer's weights, as "8GB"; default a part of what is free. On a CPU, RAM.
        compiled: whether the transformer's blocks are compiled, from the second picture of a size on; default
            on CUDA only.
        custom_nodes: folder of your own nodes, as ComfyUI's `custom_nodes`; their code is run.

    Raises:
        UsoflowError: `budget_invalid`, `settings_invalid`.
    """

    def __init__(
        self,
        *,
        models: str | Path | None = None,
        inputs: str | Path | None = None,
        output: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        custom_nodes: str | Path | None = None,
        vram: str | None = None,
        compiled: bool | None = None,
    ) -> None:
        self._lock = threading.RLock()  # models are shared: of several threads one computes
        self._files_lock = threading.Lock()  # while it does, others prepare
        self._numbers = itertools.count()
        self._models = _path("models", models)
        self._inputs = _path("inputs", inputs)
        self._output = _path("output", output)
        self._device, self._dtype, self._compiled = device, dtype, compiled
        self._budget = None if vram is None else bytes_of(str(vram))
        self._custom_nodes = _path("custom_nodes", custom_nodes)
        self._executor: Executor | None = None
        self._temp: tempfile.TemporaryDirectory[str] | None = None
        self._written: dict[Path, None] = {}  # pictures from memory, the last one last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget all models and outputs."""
        with self._lock:
            if self._executor is not None:
                self._executor.cache.clear()
                self._executor.library.clear()
            self._executor = None
        with self._files_lock:
            if self._temp is not None:
                self._temp.cleanup()
            self._temp = None
            self._written.clear()

    @cached_property
    def nodes(self) -> NodeRegistry:
        """The node types that there are.

        Raises:
            UsoflowError: `file_not_found` if the folder of custom nodes is not there.
        """
        from usoflow.nodes import registry
        from usoflow.nodes.custom_folder import with_custom

        with self._lock:
            return with_custom(registry(), self._custom_nodes)

    def model_files(self) -> ModelFiles:
        """Which files `generate` uses: the tutorial's, else those that take their places. Imports no torch.

        Raises:
            UsoflowError: `file_not_found` for a models folder that is not there.
        """
        return at_hand(find_folders(models=self._models))

    def load(self, file: WorkflowSource) -> Workflow:
        """`Workflow.load` with this engine's node types.

        The official template has the names and sizes of the models that are there, as in our editor.

        Raises:
            UsoflowError: as `Workflow.load` does.
        """
        if isinstance(file, bytes | Mapping) or str(file) != f"{TEMPLATE_PREFIX}{TEMPLATE}":
            return Workflow.load(file, nodes=self.nodes)
        files = self.model_files()
        workflow = Workflow.load(adapted(files), nodes=self.nodes)
        return replace(workflow, warnings=(*files.notes, *workflow.warnings))

    def check(self, workflow: Workflow | WorkflowSource) -> Job:
        """Whether a workflow (or a file, its bytes, or JSON, with one) can be run. Imports no torch.

        Raises:
            UsoflowError: what is wrong with it or missing, and what to do about it.
        """
        workflow = workflow if isinstance(workflow, Workflow) else self.load(workflow)
        named = [node.inputs.get("image") for node in workflow.prompt.nodes.values()]
        for name, path in workflow.pictures.items():
            if name in named:
                check_picture(path, GIVE_AGAIN)
        return check(workflow, self._folders(workflow), self.nodes)

    def start(self) -> None:
        """Choose the device and get ready to load models; otherwise the first run does.

        Raises:
            UsoflowError: `device_unavailable`.
        """
        with self._lock:
            if self._executor is not None:
                return
            from usoflow.execution.executor import Executor
            from usoflow.models.library import ModelLibrary
            from usoflow.models.placement import Placement
            from usoflow.nodes.image import clear_previews

            clear_previews(temp_folder())
            placement = Placement.choose(self._device, self._dtype, self._budget, compiled=self._compiled)
            self._executor = Executor(self.nodes, ModelLibrary(placement))

    def run(
        self,
        workflow: Workflow | Job | WorkflowSource,
        *,
        progress: Callable[[Event], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> Result:
        """Run a workflow; while one runs, another waits.

        Args:
            workflow: loaded, checked, a file, its bytes, or JSON (a UI workflow or an API prompt).
            progress: is told what happens (`NodeStarted`, `NodeProgress`, `NodeFinished`, ...).
            cancellation: its `set()`, from any thread, stops the run after the step in progress; one that
                waits for another, at once.

        Raises:
            UsoflowError: what is wrong, and what to do about it; `paths` are what was written before.
        """
        job = workflow if isinstance(workflow, Job) else self.check(workflow)
        with self._turn(cancellation):
            self.start()
            executor = self._executor  # which a listener may take away by `close`
            assert executor is not None
            done = executor.run(
                job.workflow.prompt,
                job.targets,
                job.folders,
                workflow=job.workflow.ui,
                listen=progress or (lambda event: None),
                cancellation=cancellation,
            )
            return _result(job, done, executor.library.placement)

    @contextmanager
    def _turn(self, cancellation: Cancellation | None) -> Iterator[None]:
        """Wait until no other run is in progress; not for one that is to stop."""
        while not self._lock.acquire(timeout=WAITED_SECONDS):
            if cancellation is not None:
                cancellation.check()
        try:
            yield
        finally:
            self._lock.release()

    def workflow(
        self,
        prompt: str,
        *,
        subject: Sequence[Picture] | Picture | None = None,
        style: Sequence[Picture] | Picture | None = None,
        size: tuple[int, int] | None = None,
        steps: int = 20,
        guidance: float = 3.5,
        seed: int | None = None,
        subject_size: int | None = None,
        keep_size: bool = False,
        easycache: float | None = None,
        loras: Loras = (),
    ) -> Workflow:
        """The official USO workflow for a picture; the arguments are those of `Request`.

        Subject and style are a picture each, or several (of those from memory, the engine keeps the last
        256); so are further LoRAs, names in the loras folder, also with a strength: ("name.safetensors",
        0.8) or {"name.safetensors": 0.8}. Without a seed one is drawn; `seeds` has it.
        Sizes that are not given are those that the transformer was trained for.

        Raises:
            UsoflowError: what is wrong, and what to do about it.
        """
        request = Request(
            prompt,
            subjects=self._files(subject),
            styles=self._files(style),
            size=plain(size),
            steps=plain(steps),
            guidance=plain(guidance),
            seed=secrets.randbelow(RANDOM_SEEDS) if seed is None else plain(seed),
            subject_size=plain(subject_size),
            keep_size=keep_size,
            easycache=plain(easycache),
            loras=_loras(loras),
        )
        return build(request, self.model_files())

    def generate(
        self,
        prompt: str,
        *,
        progress: Callable[[Event], None] | None = None,
        cancellation: Cancellation | None = None,
        **asked: Unpack[Asked],
    ) -> Result:
        """One picture by the official USO workflow.

        Args:
            prompt: what it shows.
            progress, cancellation: as for `run`.
            asked: the other arguments of `workflow`: subject, style, size, steps, guidance, seed, ...

        Raises:
            UsoflowError: what is wrong, and what to do about it.
        """
        workflow = self.workflow(prompt, **asked)
        return self.run(workflow, progress=progress, cancellation=cancellation)

    def _files(self, pictures: Sequence[Picture] | Picture | None) -> tuple[Path, ...]:
        if pictures is None:
            return ()
        alone = isinstance(pictures, str | bytes | bytearray) or not isinstance(pictures, Sequence)
        several = cast("Sequence[Picture]", [pictures] if alone else pictures)
        return tuple(self._file(picture) for picture in several)

    def _file(self, picture: Picture) -> Path:
        """The file of a picture; one from memory is written to a folder of this engine."""
        if isinstance(picture, str | Path) and str(picture):
            return expanded(picture)
        from PIL import Image

        from usoflow.nodes.pictures import write_upright

        if not isinstance(picture, Image.Image):
            what = "an empty text" if isinstance(picture, str) else f"a {type(picture).__name__}"
            advice = "Give a path, or a picture of PIL: Image.open(io.BytesIO(data)), Image.fromarray(array)."
            raise UsoflowError("request_invalid", f"A picture is {what}.", remedy=advice)
        with self._files_lock:
            self._temp = self._temp or tempfile.TemporaryDirectory(prefix="usoflow-")
            written = Path(self._temp.name) / f"picture_{next(self._numbers)}.png"
        write_upright(picture, written)
        # One file for a picture that comes again, which then has the same name as well.
        path = written.with_stem(hashlib.sha256(written.read_bytes()).hexdigest())
        written.replace(path)
        with self._files_lock:
            self._written.pop(path, None)
            self._written[path] = None
            while len(self._written) > KEPT_PICTURES:
                oldest = next(iter(self._written))
                del self._written[oldest]
                with suppress(OSError):  # on Windows one that is being read
                    oldest.unlink()
        return path

    def _folders(self, workflow: Workflow) -> Folders:
        return find_folders(
            models=self._models,
            inputs=self._inputs,
            beside=workflow.source,
            output=self._output,
            given_images=workflow.pictures,
        )


def _result(job: Job, done: RunResult, placement: Placement) -> Result:
    paths = tuple(path for shown in done.shown.values() for path in shown.paths(job.folders))
    return Result(
        paths=paths,
        seeds=job.workflow.seeds,
        seconds=done.seconds,
        shown=done.shown,
        nodes=done.finished,
        cached=done.cached,
        warnings=job.warnings + done.warnings,
        device=placement.device.type,
        dtype=str(placement.dtype).removeprefix("torch."),
        workflow=job.workflow,
        checksums=tuple(sha256(path) if path.is_file() else "" for path in paths),
    )


def _loras(loras: Loras) -> tuple[tuple[str, float], ...]:
    match loras:
        case None:
            return ()
        case Mapping():
            return tuple(_with_strength(item) for item in loras.items())
        case str() | (str(), int() | float()):
            return (_with_strength(loras),)
        case Sequence():
            return tuple(_with_strength(item) for item in loras)
    return (_with_strength(loras),)


def _with_strength(lora: object) -> tuple[str, float]:
    match lora:
        case str():
            return lora, 1.0
        case (str() as name, int() | float() as strength):
            return name, strength
    raise UsoflowError(
        "request_invalid",
        f"{lora!r} is not a LoRA.",
        remedy='Name one of the loras folder, also with a strength: ("name.safetensors", 0.8).',
    )


def _path(name: str, value: str | Path | None) -> Path | None:
    """A folder that is given. An empty text, as of a variable that is not set, would be the current one."""
    if value == "":
        raise UsoflowError(
            "settings_invalid", f"{name} is an empty path.", remedy="Leave it out, or name it."
        )
    return None if value is None else Path(value)

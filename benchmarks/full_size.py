"""FLUX.1 at its full depth in fp8: loading, memory, seconds of a step; in a process of its own.

    python -m benchmarks.full_size MODELS [VRAM]

prints JSON. MODELS holds a checkpoint as `synthetic.checkpoint` writes it, and the files of USO.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import synthetic
from benchmarks.report import Table
from usoflow.execution.progress import NodeFinished
from usoflow.models.flux_config import OFFICIAL_DEPTH

CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"
PLANS = {"by itself": None, "--vram 6GB": "6GB"}
PIECE = 64 << 20
T5_LAYERS = 24


def table(scratch: Path | None, *, quick: bool) -> Table:
    """Write the files, measure each plan in a new process, remove them."""
    depth, t5 = (synthetic.SHALLOW, 1) if quick else (OFFICIAL_DEPTH, T5_LAYERS)
    spec = synthetic.checkpoint(depth, "F8_E4M3", t5_layers=t5)
    with synthetic.written({CHECKPOINT: spec, **synthetic.uso_files(depth)}, scratch) as models:
        found = {name: _in_new_process(models, budget) for name, budget in PLANS.items()}
    return Table(
        "Full depth in fp8" if not quick else "Full depth in fp8 (quick: shallow)",
        f"{depth[0]} double and {depth[1]} single blocks, T5 of {t5} layers, "
        f"{synthetic.size(spec) / 1e9:.1f} GB in one file, with USO's LoRA; `generate` at 256x256. The file"
        " is out of the system's cache before it is read and before it is loaded.",
        ["", *found],
        [[row, *(_cell(plan[row]) for plan in found.values())] for row in next(iter(found.values()))],
        raw=found,
    )


def _in_new_process(models: Path, budget: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.full_size", str(models), *([budget] if budget else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def read_seconds(path: Path, ranges: Sequence[tuple[int, int]], *, kept: bool = False) -> float:
    """Time to read parts of a file, by first byte and end, into memory used again, or new and `kept`."""
    start = time.perf_counter()
    handle = os.open(path, os.O_RDONLY)
    try:
        pieces = [
            (begin, min(PIECE, end - begin)) for first, end in ranges for begin in range(first, end, PIECE)
        ]
        own = threading.local()

        def begin_thread() -> None:
            own.buffer = memoryview(bytearray(PIECE))

        def read(piece: tuple[int, int]) -> bytes | None:
            begin, size = piece
            if kept:
                return os.pread(handle, size, begin)
            os.preadv(handle, [own.buffer[:size]], begin)
            return None

        with ThreadPoolExecutor(os.cpu_count(), initializer=begin_thread) as pool:
            held = list(pool.map(read, pieces))
        seconds = time.perf_counter() - start
        del held
    finally:
        os.close(handle)
    return seconds


def read_and_keep_seconds(path: Path, ranges: Sequence[tuple[int, int]]) -> float:
    """The same into new memory, in a process of its own, so that none of it is left for this one."""
    forget(path)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        return other.submit(read_seconds, path, ranges, kept=True).result()


def forget(path: Path) -> None:
    """Take a file out of the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def measure(models: Path, budget: str | None) -> dict[str, Any]:
    """What the table shows."""
    from usoflow.api.engine import Engine

    found = _loading(models / CHECKPOINT, budget)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(models=models, output=folder, device="cpu", vram=budget) as engine,
    ):
        one = engine.generate("a cat", size=(256, 256), steps=1, seed=0)
        more = engine.generate("a cat", size=(256, 256), steps=3, seed=1)
    sampling = sum(node.seconds for node in more.nodes if node.class_type == "KSampler")
    return {
        "dtype": one.dtype,
        **found,
        "generate with 1 step, after that loading, s": one.seconds,
        "step of the sampler, s (mean of 3)": sampling / 3,
        **{
            f"peak memory, {kind}, GB": size / 1e9 for kind, size in _peaks((*one.nodes, *more.nodes)).items()
        },
    }


def _peaks(nodes: Sequence[NodeFinished]) -> dict[str, int]:
    """The most that the process held while nodes of a type ran; its mark is reset before each."""
    found: dict[str, int] = {}
    for node in nodes:
        found[node.class_type] = max(found.get(node.class_type, 0), node.peak_bytes)
    return {kind: found[kind] for kind in ("CLIPTextEncode", "KSampler", "VAEDecode")}


def _loading(path: Path, budget: str | None) -> dict[str, Any]:
    """The transformer's bytes read, and its weights in place: each from the disk."""
    from usoflow.execution.memory import kept_memory
    from usoflow.models.checkpoint import TensorFile
    from usoflow.models.library import ModelLibrary
    from usoflow.models.placement import Placement
    from usoflow.settings import bytes_of

    component = TensorFile.open(path).components()["flux"]
    ranges = [(tensor.start, tensor.start + tensor.bytes) for tensor in component.tensors.values()]
    keeping = read_and_keep_seconds(path, ranges)
    forget(path)
    reading = read_seconds(path, ranges)
    forget(path)
    library = ModelLibrary(Placement.choose("cpu", budget=bytes_of(budget) if budget else None))
    start = time.perf_counter()
    with kept_memory(), torch.inference_mode():  # as in a run
        flux = library.flux(component, (), "default")
        touched = [_touch(parameter) for parameter in flux.parameters()]
    loading = time.perf_counter() - start
    del flux, touched
    library.clear()
    return {
        "read the transformer's bytes, s": reading,
        "read them into new memory, s": keeping,
        "weights in place, s": loading,
        "in place : read": loading / reading,
        "in place : read into new memory": loading / keeping,
    }


def _touch(parameter: torch.Tensor) -> int:
    """Read a byte of every page; what is packed has been read."""
    return 0 if parameter.is_mkldnn else int(parameter.view(torch.uint8).flatten()[::4096].sum())


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else None)))

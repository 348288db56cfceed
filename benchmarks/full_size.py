"""FLUX.1 at its full depth in fp8: loading, memory, seconds of a step; in a process of its own.

    python -m benchmarks.full_size MODELS

prints JSON. MODELS holds a checkpoint as `synthetic.checkpoint` writes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import synthetic
from benchmarks.report import Table

CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"
PIECE = 64 << 20
T5_LAYERS = 24


def table(scratch: Path | None, *, quick: bool) -> Table:
    """Write the file, measure in a new process, remove it."""
    depth, t5 = (synthetic.SHALLOW, 1) if quick else (synthetic.FULL, T5_LAYERS)
    spec = synthetic.checkpoint(depth, "F8_E4M3", t5_layers=t5)
    with synthetic.written({CHECKPOINT: spec}, scratch) as models:
        command = [sys.executable, "-m", "benchmarks.full_size", str(models)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Table(
        "Full depth in fp8" if not quick else "Full depth in fp8 (quick: shallow)",
        f"{depth[0]} double and {depth[1]} single blocks, T5 of {t5} layers, "
        f"{synthetic.size(spec) / 1e9:.1f} GB in one file; `generate` at 256x256. The file is out of the"
        " system's cache before it is read and before it is loaded.",
        ["", ""],
        [[name, value if isinstance(value, str) else f"{value:.2f}"] for name, value in found.items()],
        raw=found,
    )


def read_seconds(path: Path, names: dict[str, tuple[int, int]]) -> float:
    """Time to read byte ranges of a file into memory that is used again and again, some at a time."""
    start = time.perf_counter()
    handle = os.open(path, os.O_RDONLY)
    try:
        pieces = [
            (begin, min(PIECE, end - begin))
            for first, end in names.values()
            for begin in range(first, end, PIECE)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda piece: len(os.pread(handle, piece[1], piece[0])), pieces))
    finally:
        os.close(handle)
    return time.perf_counter() - start


def forget(path: Path) -> None:
    """Take a file out of the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def ranges(path: Path, prefix: str) -> dict[str, tuple[int, int]]:
    """Where in the file the tensors of a prefix lie."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name.startswith(prefix)
    }


def measure(models: Path) -> dict[str, Any]:
    """What the table shows."""
    from usoflow.api.engine import Engine
    from usoflow.execution.memory import PeakMemory
    from usoflow.models.checkpoint import TensorFile
    from usoflow.models.library import ModelLibrary
    from usoflow.models.placement import Placement

    path = models / CHECKPOINT
    tensors = ranges(path, "model.diffusion_model.")
    forget(path)
    reading = read_seconds(path, tensors)
    forget(path)
    placement = Placement.choose("cpu")
    library, component = ModelLibrary(placement), TensorFile.open(path).components()["flux"]
    start = time.perf_counter()
    with torch.inference_mode():
        flux = library.flux(component, (), "default")
        touched = [_touch(parameter) for parameter in flux.parameters()]
    loading = time.perf_counter() - start
    del flux, touched
    library.clear()
    peak = PeakMemory(placement.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(models=models, output=folder, device="cpu") as engine,
    ):
        one = engine.generate("a cat", size=(256, 256), steps=1, seed=0)
        more = engine.generate("a cat", size=(256, 256), steps=3, seed=1)
    whole = sum(node.seconds for node in more.nodes if node.class_type == "KSampler")
    return {
        "dtype": one.dtype,
        "read the transformer's bytes, s": reading,
        "weights in place, s": loading,
        "in place : read": loading / reading,
        "generate with 1 step, cold, s": one.seconds,
        "seconds per step (of 3)": whole / 3,
        "peak memory, GB": peak.bytes() / 1e9,
    }


def _touch(parameter: torch.Tensor) -> int:
    """Read a byte of every page; what is packed has been read."""
    return 0 if parameter.is_mkldnn else int(parameter.view(torch.uint8).flatten()[::4096].sum())


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))

"""Model files of FLUX.1's widths and any depth, of random numbers, written without holding them in memory.

Names and shapes are those of the official files (`tests/golden/synth.py`). The numbers are pieces of one pool
of normal numbers: drawing 12 billion would take longer than what is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tests.golden import synth
from torch import Tensor

Spec = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape, dtype

POOL = 1 << 24
TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn
}  # fmt: skip
SHALLOW = (1, 1)
SPARE = 2 << 30  # bytes of disk to leave free


def transformer(depth: tuple[int, int], dtype: str) -> Spec:
    """The transformer alone."""
    double, single = depth
    return {name: (shape, dtype) for name, shape in synth.flux(double=double, single=single).items()}


def checkpoint(depth: tuple[int, int], dtype: str, *, t5_layers: int) -> Spec:
    """The all-in-one file: transformer and T5 in `dtype`, CLIP in F16, VAE in F32."""
    double, single = depth
    parts = (
        (synth.flux(double=double, single=single), dtype),
        (synth.t5(layers=t5_layers), dtype),
        (synth.clip_l(), "F16"),
        (synth.vae(), "F32"),
    )
    return {
        name: (shape, "F32" if name.endswith("logit_scale") else part_dtype)
        for shapes, part_dtype in parts
        for name, shape in shapes.items()
    }


def uso_files(depth: tuple[int, int]) -> Mapping[str, Spec]:
    """LoRA, projector and vision tower, by their place in a models folder."""
    double, single = depth
    shapes = {
        "loras/uso-flux1-dit-lora-v1.safetensors": (synth.lora(double=double, single=single), "BF16"),
        "model_patches/uso-flux1-projector-v1.safetensors": (synth.projector(), "BF16"),
        "clip_vision/sigclip_vision_patch14_384.safetensors": (synth.siglip(), "F16"),
    }
    return {
        path: {name: (shape, dtype) for name, shape in found.items()}
        for path, (found, dtype) in shapes.items()
    }


@contextmanager
def written(files: Mapping[str, Spec], place: Path | None) -> Iterator[Path]:
    """A models folder with these files, removed at the end.

    Raises:
        SystemExit: if the disk has no room for them.
    """
    needed = sum(size(spec) for spec in files.values())
    with TemporaryDirectory(dir=place, prefix="usoflow-bench-") as folder:
        free = shutil.disk_usage(folder).free
        if free < needed + SPARE:
            raise SystemExit(
                f"{needed / 1e9:.0f} GB are needed in {folder}, {free / 1e9:.0f} GB are free: name another"
                " place with --scratch."
            )
        for name, spec in files.items():
            write(Path(folder, name), spec)
        yield Path(folder)


def size(spec: Spec) -> int:
    """Bytes of the tensors."""
    return sum(prod(shape) * TORCH[dtype].itemsize for shape, dtype in spec.values())


def write(path: Path, spec: Spec) -> None:
    """One file; threads write its tensors, piece by piece."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (shape, dtype) in spec.items():
        begin, end = end, end + prod(shape) * TORCH[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    pools: dict[tuple[str, float, float], Tensor] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream, ThreadPoolExecutor() as threads:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.flush()
        written = []
        for number, (name, (shape, dtype)) in enumerate(spec.items()):
            scale, mean = synth.rule(name, shape)
            kind = (dtype, scale, mean)
            if kind not in pools:
                pools[kind] = (pool * scale + mean).to(TORCH[dtype]).view(torch.uint8)
            place = 8 + len(text) + header[name]["data_offsets"][0]
            for piece in _pieces(pools[kind], prod(shape) * TORCH[dtype].itemsize, number):
                written.append(threads.submit(_put, stream.fileno(), piece, place))
                place += len(piece)
        for piece_written in written:
            piece_written.result()


def _put(file: int, piece: Tensor, place: int) -> None:
    """All of it: the system writes 2 GB at once at most."""
    if os.pwrite(file, piece.numpy().data, place) != len(piece):
        raise OSError("A piece was not written whole.")


def _pieces(pool: Tensor, count: int, number: int) -> Iterator[Tensor]:
    """`count` bytes of the pool, from a place that depends on the tensor."""
    start = number * 1_000_003 * 8 % len(pool)
    while count > 0:
        piece = pool[start : start + count]
        yield piece
        count, start = count - len(piece), 0

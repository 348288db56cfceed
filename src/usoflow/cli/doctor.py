"""`usoflow doctor`: what this machine has, and what will be slow or missing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from usoflow.settings import Folders

GB = 1e9
CHECKPOINT_GB = 17.2  # flux1-dev-fp8: what a run reads, and wants to keep
PORT = 8188  # ComfyUI's, and ours


@dataclass(frozen=True, slots=True)
class Finding:
    """One line; `advice` is given where something will be slow or is missing."""

    subject: str
    fact: str
    advice: str = ""


def doctor(
    models: Annotated[
        Path | None, typer.Option(help="A ComfyUI folder or its models folder; else USOFLOW_MODELS.")
    ] = None,
) -> None:
    """Tell what this machine can do, what is missing, and what will be slow and why."""
    from usoflow.settings import find_folders

    folders = find_folders(models=models)
    for finding in (*_torch(), *_memory(), *_folders(folders), _port()):
        print(f"{'!' if finding.advice else '-'} {finding.subject}: {finding.fact}")
        if finding.advice:
            print(f"    {finding.advice}")


def _torch() -> Iterator[Finding]:
    import torch

    from usoflow.models.placement import Placement

    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield Finding("torch", f"{torch.__version__}, {threads}")
    placement = Placement.choose()
    dtype = str(placement.dtype).removeprefix("torch.")
    yield _device(placement.device, dtype)


def _device(device: torch.device, dtype: str) -> Finding:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fact = f"{properties.name}, {properties.total_memory / GB:.0f} GB, computes in {dtype}"
        small = properties.total_memory / GB < CHECKPOINT_GB
        return Finding("device", fact, "The transformer does not fit: use --device cpu." if small else "")
    if device.type == "mps":
        return Finding("device", f"Apple GPU, computes in {dtype}")
    if dtype == "bfloat16":
        return Finding("device", "CPU with bf16 instructions", "Minutes a picture: a GPU is far faster.")
    return Finding(
        "device",
        f"CPU without bf16 instructions, computes in {dtype}",
        "Many minutes a picture: fewer steps (--steps 8), a smaller --size and --easycache 0.2 help.",
    )


def _memory() -> Iterator[Finding]:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    advice = f"The checkpoint ({CHECKPOINT_GB} GB) is read from disk again at each step."
    yield Finding("memory", f"{total:.0f} GB", advice if total < CHECKPOINT_GB else "")


def _folders(folders: Folders) -> Iterator[Finding]:
    from usoflow.api.download import missing

    lacking = [file.name for file in missing(folders)]
    place = folders.models["checkpoints"][0].parent
    advice = f"Missing: {', '.join(lacking)}. `usoflow models pull` gets them." if lacking else ""
    yield Finding("models", str(place), advice)
    output = folders.output.resolve()
    existing = next(path for path in (output, *output.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GB
    writable = os.access(existing, os.W_OK)
    advice = "" if writable else "It cannot be written to: choose another with --output or USOFLOW_OUTPUT."
    yield Finding("output", f"{output}, {free:.0f} GB free", advice)


def _port() -> Finding:
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", PORT)) == 0
    advice = "Another server (ComfyUI?) uses it: give ours another one." if taken else ""
    return Finding("port", f"{PORT} is {'taken' if taken else 'free'}", advice)

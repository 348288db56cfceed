"""`usoflow doctor`: what this machine has, and what will be slow or missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from usoflow.cli.options import Models
from usoflow.errors import UsoflowError

if TYPE_CHECKING:
    import torch

    from usoflow.settings import Folders

GB = 1e9
TRANSFORMER_GB = 12.0  # of flux1-dev-fp8: what every step needs
PASSING = "Of a transformer in fp8 not all blocks stay there: the others come from memory at each step."
READ_AGAIN = (
    "On a CPU the transformer in fp8 stays in memory where 20 GB are free. Here its blocks are read again at"
    " each step, which is slower: close other programs."
)
PORT = 8188  # ComfyUI's, and ours
STEP_TFLOP = 70  # of FLUX.1 at 1024x1024: 4352 tokens through 6.4e9 weights (56), and their attention (13)
STEPS = 20  # of a picture, unless one asks for others
PATIENCE = 60  # seconds a picture may take before we call it slow
WITH_CUDA = (
    "This torch has no CUDA. For the NVIDIA GPU install torch as https://pytorch.org/get-started/locally"
    " tells."
)
NO_DRIVER = "torch cannot use the NVIDIA card here: its driver is missing or too old for"
MATRIX = 2048  # side of the matrices whose product is timed
EXTRAS = {"ui": ("comfyui_frontend_package", "the editor"), "gguf": ("gguf", "GGUF files")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line; `advice` is given where something will be slow or is missing."""

    subject: str
    fact: str
    advice: str = ""


def doctor(
    models: Models = None,
) -> None:
    """Tell what this machine can do, what is missing, and what will be slow and why."""
    from usoflow.settings import find_folders

    folders = find_folders(models=models)
    for finding in (*_torch(), *_memory(), *_folders(folders), _port(), *_extras()):
        print(f"{'!' if finding.advice else '-'} {finding.subject}: {finding.fact}")
        if finding.advice:
            print(f"    {finding.advice}")


def _torch() -> Iterator[Finding]:
    import torch

    from usoflow.models.placement import Placement

    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield Finding("torch", f"{torch.__version__}, {threads}")
    try:
        placement = Placement.choose()
    except UsoflowError as error:
        yield Finding("device", error.detail, error.remedy)
        return
    yield _device(placement.device)
    yield Finding("matrix units", ", ".join(_matrix_units(placement.device)) or "none")
    yield _speed(placement.device, placement.dtype)


def _device(device: torch.device) -> Finding:
    import torch

    from usoflow.models.placement import PART_OF_GPU

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fact = f"{properties.name}, {properties.total_memory / GB:.0f} GB"
        small = PART_OF_GPU * properties.total_memory / GB < TRANSFORMER_GB
        return Finding("device", fact, PASSING if small else "")
    if device.type == "mps":
        return Finding("device", "Apple GPU")
    if torch.version.hip is None and shutil.which("nvidia-smi"):
        built = torch.version.cuda
        unused = f"{NO_DRIVER} CUDA {built}: `nvidia-smi` tells of it." if built else WITH_CUDA
        return Finding("device", "CPU", unused)
    return Finding("device", "CPU", "No CUDA or Apple GPU is here: one would be far faster.")


def _matrix_units(device: torch.device) -> Iterator[str]:
    """What multiplies matrices in hardware, and in which number formats."""
    import torch

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        formats = [name for name, since in (("fp16", 7), ("bf16", 8)) if major >= since]
        formats += ["fp8"] if (major, minor) >= (8, 9) else []
        yield f"tensor cores ({', '.join(formats)})" if formats else "none: before compute capability 7.0"
    elif device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        yield f"{capability} vectors"
        checks = {
            "AVX-512 bf16": "_is_avx512_bf16_supported",
            "VNNI (int8)": "_is_vnni_supported",
            "AMX tiles (bf16, int8)": "_is_amx_tile_supported",
        }
        yield from (name for name, check in checks.items() if getattr(torch.cpu, check, bool)())


def _speed(device: torch.device, dtype: torch.dtype) -> Finding:
    """How fast two matrices are multiplied now, and what follows for a step."""
    import torch

    a = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    tflops = 2 * MATRIX**3 / min(seconds) / 1e12
    step = STEP_TFLOP / tflops
    name = str(dtype).removeprefix("torch.")
    fact = f"{tflops:.2f} TFLOP/s in {name}: a step at 1024x1024 takes {step:.0f} s or more"
    slow = step * STEPS > PATIENCE
    advice = "Fewer steps (--steps 8), a smaller --size (512x512 takes a third) and --easycache help."
    return Finding("speed", fact, advice if slow else "")


def _memory() -> Iterator[Finding]:
    from usoflow.models.placement import PART_OF_CPU, free_memory, memory

    total, free = memory() / GB, free_memory() / GB
    small = PART_OF_CPU * free < TRANSFORMER_GB
    yield Finding("memory", f"{total:.0f} GB, {free:.0f} GB free", READ_AGAIN if small else "")


def _folders(folders: Folders) -> Iterator[Finding]:
    from usoflow.catalogue import missing, pull_command
    from usoflow.settings import check_writable, existing_part

    lacking = [file.name for file in missing(folders)]
    places = list(dict.fromkeys(str(root.parent) for root in folders.models["checkpoints"]))
    advice = f"Missing: {', '.join(lacking)}. `{pull_command(folders)}` gets them." if lacking else ""
    yield Finding("models", ", ".join(places), advice)
    yield Finding("input", ", ".join(str(root.absolute()) for root in folders.inputs))
    output, free, advice = folders.output.absolute(), "", ""
    try:
        check_writable(output)
        free = f", {shutil.disk_usage(existing_part(output) or output).free / GB:.0f} GB free"
    except UsoflowError:
        advice = "It cannot be written to: choose another with --output or USOFLOW_OUTPUT."
    yield Finding("output", f"{output}{free}", advice)


def _extras() -> Iterator[Finding]:
    for extra, (module, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        fact = f"{purpose}: {'there' if there else 'not installed'}"
        yield Finding(f"usoflow[{extra}]", fact, "" if there else f'pip install "usoflow[{extra}]"')


def _port() -> Finding:
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", PORT)) == 0
    advice = "Another server (ComfyUI?) uses it: give ours another one." if taken else ""
    return Finding("port", f"{PORT} is {'taken' if taken else 'free'}", advice)

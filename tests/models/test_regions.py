"""Compiled blocks: never in a first run, each type once, with LoRAs and weights that pass, or not at all."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import networks
from networks import lora_of, transformer_of
from usoflow.models import int8, regions
from usoflow.models.checkpoint import Component
from usoflow.models.flux import Flux
from usoflow.models.library import ModelLibrary
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.passage import Passage
from usoflow.models.placement import Placement
from usoflow.models.residence import multiply_in_fp8
from usoflow.models.weights import LowRank

CPU = torch.device("cpu")
TESTS = Path(__file__).parents[1]  # where a process of its own finds `untrained`
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at its imports


class Graphs:
    """A backend that runs what was traced as it is, and counts."""

    def __init__(self) -> None:
        self.traced = self.calls = 0
        self.broken = False

    def __call__(self, graph: Any, _inputs: list[Tensor], **_options: Any) -> Callable[..., Any]:
        if self.broken:
            raise RuntimeError("no compiler is here\nand more of it")
        self.traced += 1

        def call(*inputs: Tensor) -> Any:
            self.calls += 1
            return graph(*inputs)

        return call


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """torch.compile traces as ever, and gives what it traced to this."""
    found = Graphs()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=found))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield found
    torch._dynamo.reset()


def files(models: Path) -> tuple[Component, Component]:
    """Transformer and LoRA."""
    return transformer_of(models), lora_of(models)


def velocity(flux: Flux, side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return networks.velocity(flux, dtype, height=side, reference=True)


def near(found: Tensor, expected: Tensor, bound: float = 1e-5) -> bool:
    return float((found - expected).norm() / expected.norm()) < bound


def require_same_compiled(library: ModelLibrary, flux: Flux, graphs: Graphs, bound: float) -> None:
    """In bf16: of two runs the first is computed eagerly, the second compiled."""
    library.begin_run()
    expected = velocity(flux, dtype=torch.bfloat16)
    library.begin_run()
    assert near(velocity(flux, dtype=torch.bfloat16), expected, bound)
    assert graphs.calls == len(flux.blocks)


@torch.inference_mode()
def test_a_second_run_of_the_same_shapes_is_compiled(small_models: Path, graphs: Graphs) -> None:
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    flux = library.flux(file, (), "default")
    library.begin_run()
    expected = velocity(flux)
    velocity(flux)  # another step, or another sampler: still the first picture
    other = velocity(flux, side=12)
    assert graphs.calls == 0
    library.begin_run()
    assert near(velocity(flux), expected)
    assert (graphs.traced, graphs.calls) == (2, len(flux.blocks))
    velocity(flux, side=16)  # new in this run
    assert graphs.traced == 2
    assert near(velocity(flux, side=12), other)
    assert graphs.traced == 4


@torch.inference_mode()
def test_a_server_meets_many_sizes(small_models: Path, graphs: Graphs) -> None:
    """More than torch compiles of a function by itself."""
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    flux, sides = library.flux(file, (), "default"), range(4, 24, 2)
    for _ in range(2):
        library.begin_run()
        for side in sides:
            velocity(flux, side=side)
    assert graphs.traced == 2 * len(sides)


@torch.inference_mode()
def test_nothing_is_compiled_where_it_was_not_asked_for(small_models: Path, graphs: Graphs) -> None:
    library, (file, _) = ModelLibrary(Placement.choose("cpu", "fp32")), files(small_models)
    for _ in range(3):
        library.begin_run()
        velocity(library.flux(file, (), "default"))
    assert graphs.calls == 0


@torch.inference_mode()
def test_a_network_that_was_loaded_again_goes_on(small_models: Path, graphs: Graphs) -> None:
    """As where it had to make room: what was compiled for its blocks is for blocks of their kinds."""
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    for run in range(3):
        library.begin_run()
        flux = library.flux(file, (), "default")
        velocity(flux)
        assert graphs.calls == run * len(flux.blocks)
        library.forget_models()
    assert graphs.traced == 2


@torch.inference_mode()
def test_weights_in_another_dtype_begin_anew(small_models: Path, graphs: Graphs) -> None:
    library, (file, _) = ModelLibrary(Placement(CPU, torch.bfloat16, compiled=True)), files(small_models)
    for dtype in ("default", "fp8_e4m3fn"):
        library.begin_run()
        velocity(library.flux(file, (), dtype), dtype=torch.bfloat16)
    assert graphs.calls == 0


@torch.inference_mode()
def test_other_loras_begin_anew(small_models: Path, graphs: Graphs) -> None:
    """A new combination is a first picture; what was compiled for another goes on."""
    library, (file, lora) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    plain = ModelLibrary(Placement(CPU, torch.float32))
    for uses, calls in (((), 0), ((LoraUse(lora, 1.0),), 0), ((), 4), ((LoraUse(lora, 1.0),), 8)):
        library.begin_run()
        expected = velocity(plain.flux(file, uses, "default"))
        assert near(velocity(library.flux(file, uses, "default")), expected)
        assert graphs.calls == calls
    assert graphs.traced == 4


@torch.inference_mode()
def test_the_strength_of_a_lora_is_no_variant(small_models: Path, graphs: Graphs) -> None:
    library, (file, lora) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    plain = ModelLibrary(Placement(CPU, torch.float32))
    for strength in (1.0, 0.5, -0.3):
        uses = (LoraUse(lora, strength),)
        expected = velocity(plain.flux(file, uses, "default"))
        for _ in range(2):
            library.begin_run()
            assert near(velocity(library.flux(file, uses, "default")), expected)
    assert graphs.traced == 2  # one for each type of block


@torch.inference_mode()
def test_where_there_are_too_many_variants_all_are_made_anew(
    small_models: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(regions, "VARIANTS", 2)
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    flux, sides = library.flux(file, (), "default"), (4, 6, 8, 10)
    expected = [velocity(flux, side=side) for side in sides]
    library.begin_run()
    for side, wanted in zip(sides, expected, strict=True):
        assert near(velocity(flux, side=side), wanted)
    assert graphs.calls == len(sides) * len(flux.blocks)
    assert "compiler failed" not in caplog.text


@torch.inference_mode()
def test_each_thread_may_keep_as_many_variants(small_models: Path, graphs: Graphs) -> None:
    """torch's limit is of one thread; an engine is used from any."""
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    limits = []

    def steps() -> None:
        for _ in range(2):
            library.begin_run()
            with torch.inference_mode():
                velocity(library.flux(file, (), "default"))
        limits.append(torch._dynamo.config.cache_size_limit)

    for _ in range(2):
        thread = threading.Thread(target=steps)
        thread.start()
        thread.join()
    assert limits == [regions.VARIANTS] * 2


@torch.inference_mode()
def test_where_every_block_needs_its_own_code_nothing_is_compiled(
    small_models: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a LoRA that was resized layer by layer."""
    monkeypatch.setattr(regions, "OF_A_NETWORK", 2)
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    flux = library.flux(file, (), "default")
    layer = flux.double_blocks[0].img_attn.qkv
    down, up = torch.zeros(3, layer.shape[1]), torch.zeros(layer.shape[0], 3)
    layer.branches.append(LowRank(down, up, strength=1.0))
    for _ in range(2):
        library.begin_run()
        velocity(flux)
    assert graphs.calls == 0


@torch.inference_mode()
def test_weights_that_pass_stay_outside(small_models: Path, graphs: Graphs) -> None:
    """The hooks that bring them are not compiled, so each block finds its own."""
    library, (file, lora) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    plain = ModelLibrary(Placement(CPU, torch.float32))
    expected = velocity(plain.flux(file, (LoraUse(lora, 1.0),), "default"))
    base = library.flux(file, (), "default")
    Passage(base.blocks[1:], CPU, pinned=10**9)
    flux = library.flux(file, (LoraUse(lora, 1.0),), "default")
    for _ in range(3):
        library.begin_run()
        assert near(velocity(flux), expected)
        assert near(velocity(flux), expected)
    assert graphs.calls == 4 * len(flux.blocks)


@torch.inference_mode()
def test_fp8_is_compiled_too(small_models: Path, graphs: Graphs) -> None:
    library, (file, _) = ModelLibrary(Placement(CPU, torch.bfloat16, compiled=True)), files(small_models)
    flux = library.flux(file, (), "fp8_e4m3fn")
    multiply_in_fp8(flux.blocks, CPU)
    require_same_compiled(library, flux, graphs, 5e-2)  # what is rounded differs a little


@pytest.mark.parametrize("budget", [10**9, 1])
@torch.inference_mode()
def test_int8_is_compiled_too(
    small_models: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Held so, and passing."""
    monkeypatch.setattr(int8, "multiplied_here", lambda: True)
    monkeypatch.setattr(int8, "LEAST_SIDE", 1)
    placement = Placement(CPU, torch.bfloat16, budget, compiled=True, fastest=True)
    library, (file, _) = ModelLibrary(placement), files(small_models)
    flux = library.flux(file, (), "fp8_e4m3fn")
    require_same_compiled(library, flux, graphs, 5e-2)


@torch.inference_mode()
def test_bf16_weights_are_not_packed_for_a_compiler(small_models: Path, graphs: Graphs) -> None:
    library, (file, _) = ModelLibrary(Placement(CPU, torch.bfloat16, compiled=True)), files(small_models)
    flux = library.flux(file, (), "default")
    require_same_compiled(library, flux, graphs, 2e-2)


@torch.inference_mode()
def test_a_compiler_that_fails_is_said_once(
    small_models: Path, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    flux = library.flux(file, (), "default")
    graphs.broken = True
    with caplog.at_level(logging.WARNING, logger="usoflow"):
        expected = velocity(flux), velocity(flux, side=12)
        for _ in range(3):
            library.begin_run()
            assert torch.equal(velocity(flux), expected[0])
            assert torch.equal(velocity(flux, side=12), expected[1])
    assert len(caplog.records) == 1
    assert "no compiler is here" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
@torch.inference_mode()
def test_memory_that_runs_out_is_no_failure_of_the_compiler(
    small_models: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    library, (file, _) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    flux = library.flux(file, (), "default")

    def none_left(*_: object) -> None:
        raise error

    velocity(flux)
    library.begin_run()
    monkeypatch.setattr(library._regions, "_of", lambda _kind: none_left)
    with pytest.raises(RuntimeError, match=str(error)):
        velocity(flux)


@torch.inference_mode()
def test_a_compiled_network_is_forgotten_at_once(small_models: Path, graphs: Graphs) -> None:
    """Its memory is wanted for the next one."""
    library, (file, lora) = ModelLibrary(Placement(CPU, torch.float32, compiled=True)), files(small_models)
    for _ in range(2):
        library.begin_run()
        velocity(library.flux(file, (LoraUse(lora, 1.0),), "default"))
    assert graphs.calls
    kept = weakref.ref(library.flux(file, (), "default").double_blocks[0].img_attn.qkv.weight)
    gc.disable()
    try:
        library.clear()
        assert kept() is None
    finally:
        gc.enable()


PICTURES = """
import sys, torch, logging
from usoflow.models.flux import Flux
from usoflow.models.regions import Regions
from untrained import FLUX
from dataclasses import replace

torch.manual_seed(0)
flux = Flux(replace(FLUX, double_blocks=0)).requires_grad_(False)
for parameter in flux.parameters():
    parameter.normal_(std=0.05)
latent, text, pooled = torch.randn(1, 16, 8, 8), torch.randn(1, 4, FLUX.text_dim), torch.randn(1, 32)
regions = Regions()
regions.attach(flux)
with torch.inference_mode():
    inputs = flux.prepare(text, pooled, (8, 8))
    pictures = []
    for _ in range(2):
        regions.begin_run()
        pictures.append(flux(latent, torch.tensor(0.5), inputs))
    from torch._dynamo.utils import counters
    print(float((pictures[0] - pictures[1]).norm() / pictures[0].norm()))
    print(counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_hit"])
"""


def drawn(cache: Path, **variables: str) -> tuple[float, int, int, str]:
    """Two pictures in a process of their own: distance, graphs, graphs found on disk, what was said."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHINDUCTOR", "TRITON"))}
    done = subprocess.run(
        [sys.executable, "-c", PICTURES],
        env=environment
        | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    distance, traced, found = done.stdout.split()
    return float(distance), int(traced), int(found), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the cache's place is told as Linux has it")
def test_other_processes_find_what_was_compiled(tmp_path: Path) -> None:
    first = drawn(tmp_path)
    assert first[0] < 1e-5
    assert first[1:3] == (1, 0)
    assert any((tmp_path / "usoflow" / "compiled").iterdir())
    assert drawn(tmp_path)[1:3] == (1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the cache's place is told as Linux has it")
def test_without_a_compiler_all_is_eager(tmp_path: Path) -> None:
    distance, _, _, said = drawn(tmp_path, CXX="/no/such/compiler")
    assert distance == 0
    assert said.count("The compiler failed") == 1
    assert "InvalidCxxCompiler" in said


def test_by_default_a_cpu_compiles_nothing() -> None:
    assert not Placement.choose("cpu").compiled
    assert Placement.choose("cpu", compiled=True).compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_by_default_a_gpu_compiles() -> None:
    assert Placement.choose("cuda").compiled
    assert not Placement.choose("cuda", compiled=False).compiled

"""Weights ready, as stored and passing through: the same velocity, within the budget."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor, nn

from networks import relative, transformer_of, velocity
from untrained import FLUX
from usoflow.models import pages, placement, residence
from usoflow.models.checkpoint import TensorFile
from usoflow.models.flux import Flux
from usoflow.models.kernels import fast
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_flux, load_t5
from usoflow.models.pages import bring, mapped, read_ahead
from usoflow.models.placement import Placement, _free_in_container
from usoflow.models.residence import Sizes, passing_once, settle_on_cpu, settle_on_gpu
from usoflow.models.weights import Linear, LowRank

CPU = torch.device("cpu")


def flux_of(models: Path, budget: int | None, dtype: torch.dtype) -> Flux:
    library = ModelLibrary(Placement(CPU, dtype, budget))
    with torch.inference_mode():  # as the executor loads it
        return library.flux(transformer_of(models), (), "default")


def linear_layers(flux: Flux) -> list[Linear]:
    return [layer for layer in flux.modules() if isinstance(layer, Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_plan_gives_the_same_numbers(small_models: Path, dtype: torch.dtype) -> None:
    found = {}
    for budget, as_stored in ((10**9, False), (10**9, True), (1, False)):
        flux = load_flux(transformer_of(small_models))
        with torch.inference_mode():
            plan = settle_on_cpu(flux, flux.blocks, dtype, budget, as_stored=as_stored)
        found[plan] = velocity(flux, dtype)
    assert set(found) == {"ready", "stored", "passing"}
    assert torch.equal(found["ready"], found["stored"])
    assert torch.equal(found["ready"], found["passing"])


def test_plans_are_what_they_say(small_models: Path) -> None:
    """Ready: all wide, and packed where that is faster; else as the file has them."""
    ready, passing = (flux_of(small_models, budget, torch.bfloat16) for budget in (10**9, 1))
    stored = load_flux(transformer_of(small_models))
    with torch.inference_mode():
        packed = fast(torch.empty(0, dtype=torch.bfloat16))
    for layer in linear_layers(ready):
        assert (layer.weight.dtype, layer.weight.is_mkldnn) == (torch.bfloat16, packed)
    for one, other in zip(linear_layers(passing), linear_layers(stored), strict=True):
        assert one.weight.dtype == other.weight.dtype


def test_where_one_layer_fails_the_others_need_not_begin(
    small_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux, threads, begun = load_flux(transformer_of(small_models)), torch.get_num_threads(), []

    def lay(layer: Linear, dtype: torch.dtype, *, packed: bool) -> None:
        begun.append(layer)
        if len(begun) == 1:
            raise MemoryError
        time.sleep(0.02)

    monkeypatch.setattr(residence, "_hold_ready", lay)
    with torch.inference_mode(), pytest.raises(MemoryError):
        settle_on_cpu(flux, flux.blocks, torch.float32, 10**9)
    assert len(begun) < len(linear_layers(flux))
    assert torch.get_num_threads() == threads


def test_threads_of_others_count_as_before() -> None:
    """Also those that begin to compute while weights are laid, each by one thread."""
    before = torch.get_num_threads()

    def elsewhere() -> int:
        found: list[int] = []
        thread = Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    def inside(together: Barrier) -> int:
        together.wait()  # one in each thread
        torch.ones(1 << 20).exp()
        return torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        with residence._threads_by_themselves() as pool, residence._threads_by_themselves() as other:
            assert (elsewhere(), torch.get_num_threads()) == (3, 3)
            together = Barrier(6)
            counted = [each.submit(inside, together) for each in (pool, other) for _ in range(3)]
            assert [one.result() for one in counted] == [1] * 6
        assert (elsewhere(), torch.get_num_threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_training_finds_weights_as_stored(small_models: Path) -> None:
    component = transformer_of(small_models)
    flux = ModelLibrary(Placement(CPU, torch.bfloat16, 1)).flux(component, (), "default")
    assert all(len(block._forward_pre_hooks) == 1 for block in flux.blocks)  # asks whether to stop
    for one, other in zip(linear_layers(flux), linear_layers(load_flux(component)), strict=True):
        assert one.weight.dtype == other.weight.dtype
        assert one.scratch is None


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_picture_is_drawn_as_it_is_learnt(
    small_models: Path, dtype: torch.dtype, bound: float, scaled: bool
) -> None:
    """Ready weights and fast products against torch's with gradients: batch, references, style, branches
    on part of each layer's rows, scaled fp8."""

    def made() -> Flux:
        flux = load_flux(transformer_of(small_models))
        torch.manual_seed(0)
        for layer in linear_layers(flux):
            if scaled:
                layer.weight = nn.Parameter((layer.weight.float() * 8).to(torch.float8_e4m3fn), False)
                layer.scale_weight = torch.rand(layer.shape[0]) / 8
            down, up = torch.randn(4, layer.shape[1]), torch.randn(layer.shape[0] // 2, 4)
            layer.branches.append(LowRank(down / layer.shape[1] ** 0.5, up, strength=0.1, first_row=3))
        return flux

    def answer(flux: Flux) -> Tensor:
        torch.manual_seed(1)
        c = flux.config
        latent, reference = torch.randn(2, c.channels, 40, 24), torch.randn(1, c.channels, 6, 4)
        text, pooled = torch.randn(1, 4, c.text_dim), torch.randn(1, c.pooled_dim)
        inputs = flux.prepare(
            text, pooled, (40, 24), batch=2, references=[reference], style=torch.randn(1, 5, c.hidden),
            dtype=dtype,
        )  # fmt: skip
        return flux(latent, torch.tensor([0.5, 0.7]), inputs).detach()

    learnt, drawn = answer(made()), made()
    with torch.inference_mode():
        assert settle_on_cpu(drawn, drawn.blocks, dtype, 10**9) == "ready"
        difference = answer(drawn) - learnt
    assert float(difference.norm() / learnt.norm()) < bound


def test_pages_that_were_given_back_are_read_again(small_models: Path) -> None:
    """Twice through the blocks: the second time from pages that had left."""
    component = transformer_of(small_models)
    with torch.inference_mode():
        flux = ModelLibrary(Placement(CPU, torch.float32, 1)).flux(component, (), "default")
    assert mapped(flux.blocks[0].parameters()), "the file is mapped"
    first, second = (velocity(flux, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


@torch.inference_mode()
def test_an_encoders_weights_pass_through_and_nothing_of_it_stays(small_models: Path) -> None:
    t5 = load_t5(TensorFile.open(small_models / "checkpoints/flux1-dev-fp8.safetensors").components()["t5"])
    layers = [layer for layer in t5.modules() if isinstance(layer, Linear)]
    ids = torch.arange(9)[None]
    before = t5(ids)
    with passing_once(t5, t5.blocks, torch.float32):
        assert torch.equal(t5(ids), before)
    with passing_once(t5, t5.blocks, torch.bfloat16):
        assert 1e-5 < relative(t5(ids), before) < 3e-2
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in t5.blocks)
    assert not any(layer.scratch or layer.multiplied_in for layer in layers)
    assert torch.equal(t5(ids), before)


def test_memory_of_ones_own_has_no_pages_to_give_back(small_models: Path) -> None:
    assert mapped([torch.ones(1 << 16), torch.empty(0)]) == []
    assert mapped(load_flux(transformer_of(small_models)).parameters())


def test_blocks_fill_a_budget_from_the_first() -> None:
    sizes = Sizes(stored=100, ready=200, blocks=(20, 20, 20, 20))
    assert sizes.resident(100) == 4
    assert sizes.resident(99) == 1  # 20 that are no block's, two that pass, and one that fits
    assert sizes.resident(10) == 0
    uneven = Sizes(stored=100, ready=200, blocks=(30, 30, 10, 10, 10))
    assert uneven.resident(99) == 2  # 10 that are no block's; the two that pass are small
    assert uneven.resident(89) == 0  # or they are not


@pytest.mark.parametrize("pinned", [0, 10**9])
@pytest.mark.parametrize("fit", [0, 3, None])
def test_blocks_that_do_not_fit_a_device_come_and_leave(fit: int | None, pinned: int) -> None:
    """The copies' device is the CPU too: what is tested is which blocks come, when, and that they leave."""
    torch.manual_seed(0)
    flux = Flux(replace(FLUX, single_blocks=6)).requires_grad_(False)
    for parameter in flux.parameters():
        parameter.normal_(std=0.05)
    expected = velocity(flux, torch.float32)
    sizes = Sizes.of(flux, flux.blocks, torch.float32)
    rest, passing = sizes.stored - sum(sizes.blocks), sizes.blocks[fit or 0 :]
    budget = sizes.stored if fit is None else rest + sum(sizes.blocks[:fit]) + 2 * max(passing)
    resident = settle_on_gpu(flux, flux.blocks, CPU, budget, pinned=pinned)
    assert resident == (len(flux.blocks) if fit is None else fit)
    home = [[parameter.data_ptr() for parameter in block.parameters()] for block in flux.blocks]
    away: list[int] = []
    for number, block in enumerate(flux.blocks):
        block.register_forward_pre_hook(
            lambda module, _inputs, number=number: (
                away.append(number)
                if all(a.data_ptr() != b for a, b in zip(module.parameters(), home[number], strict=True))
                else None
            )
        )
    for _ in range(3):
        assert torch.equal(velocity(flux, torch.float32), expected)
    assert away == ([] if fit is None else 3 * list(range(fit, len(home))))
    assert [[parameter.data_ptr() for parameter in block.parameters()] for block in flux.blocks] == home


@pytest.mark.parametrize("budget", [10**9, 1])
def test_what_goes_to_a_gpu_is_read_ahead(
    small_models: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """The next part while one is moved, whether it stays or is pinned; the CPU stands for a GPU."""
    flux, asked = load_flux(transformer_of(small_models)), []
    monkeypatch.setattr(pages, "bring", asked.extend)
    first = [flux.img_in] if budget > 1 else [flux.img_in, flux.blocks[0]]  # which nothing comes before
    wanted = {*mapped(flux.parameters())} - {*mapped(p for part in first for p in part.parameters())}
    resident = settle_on_gpu(flux, flux.blocks, CPU, budget, pinned=10**9)
    assert resident == (len(flux.blocks) if budget > 1 else 0)
    assert wanted
    assert sorted(asked) == sorted(wanted)


def test_groups_on_the_way_to_the_root_have_limits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of Slurm is in a group of its own, which it does not see as the root."""
    own = tmp_path / "slurm" / "job 7"
    own.mkdir(parents=True)
    (tmp_path / "told").write_text("1:name=systemd:/x\n0::/slurm/job 7\n")
    monkeypatch.setattr(placement, "CONTAINER", tmp_path)
    monkeypatch.setattr(placement, "OWN_GROUP", tmp_path / "told")
    (own / "memory.max").write_text("max\n")
    (own.parent / "memory.max").write_text("1000\n")
    assert placement.memory() == 1000
    for file, text in {"max": "600", "current": "250", "stat": "inactive_file 50"}.items():
        (own / f"memory.{file}").write_text(f"{text}\n")
    assert placement.memory() == 600
    assert placement.free_memory() == 400
    (tmp_path / "memory.max").write_text("300\n")
    assert placement.memory() == 300
    monkeypatch.setattr(placement, "OWN_GROUP", tmp_path / "absent")
    assert placement.memory() == 300


@pytest.mark.skipif(sys.platform != "linux", reason="pages are known on Linux only")
def test_files_may_have_any_names(tmp_path: Path) -> None:
    """Of bytes that are no UTF-8, and of what elsewhere ends a line, though a mapping seems to follow."""
    held = []
    for odd in (b"\xff", "\x85".encode(), "\u2028".encode(), b"\r", b"\x0b", b" "):
        folder = os.fsencode(tmp_path / "weights") + odd + b"7 r 0 0 0 "
        os.mkdir(folder)
        with open(folder + b"/file", "w+b") as stream:
            stream.write(bytes(1 << 16))
            stream.flush()
            held.append(torch.frombuffer(mmap.mmap(stream.fileno(), 0), dtype=torch.uint8))
    assert mapped(held) == [(tensor.data_ptr(), 1 << 16) for tensor in held]


def test_a_container_has_its_own_limit(tmp_path: Path) -> None:
    assert _free_in_container(tmp_path) > 10**15
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 100\nactive_file 10\ninactive_file 80\nslab 10\n")
    for limit, free in (("max\n", sys.maxsize), ("1000\n", 790), ("200\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert _free_in_container(tmp_path) == free


def test_a_smaller_plan_has_half() -> None:
    assert Placement(CPU, torch.float32, 1000).smaller.budget == 500


@pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux only")
def test_threads_read_what_is_stored_into_place(tmp_path: Path) -> None:
    """Every page of a mapped file comes, though nobody touches it."""
    path, size = tmp_path / "weights", 40 << 20
    path.write_bytes(bytes(size))
    stored = torch.from_file(str(path), size=size, dtype=torch.uint8)
    assert resident_bytes(stored) == 0
    bring(mapped([stored]))
    deadline = time.monotonic() + 30
    while resident_bytes(stored) < size:
        assert time.monotonic() < deadline, f"{resident_bytes(stored)} of {size} bytes have come"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux only")
@pytest.mark.parametrize("ask", [read_ahead, bring])
def test_what_is_read_ahead_comes_whole(
    ask: Callable[[list[tuple[int, int]]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the system reads for one request: into its cache, not yet into the process."""
    monkeypatch.setattr(pages, "_POPULATE_READ", 9999)  # as before Linux 5.14
    path, size = tmp_path / "weights", 64 << 20
    path.write_bytes(bytes(size))
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    stored = torch.from_file(str(path), size=size, dtype=torch.uint8)
    if cached_bytes(stored) > size // 2:
        pytest.skip("this file system keeps its files in memory")
    ask(mapped([stored]))
    deadline = time.monotonic() + 30
    while cached_bytes(stored) < size:
        assert time.monotonic() < deadline, f"{cached_bytes(stored)} of {size} bytes have come"
        time.sleep(0.01)
    assert resident_bytes(stored) == 0
    os.close(handle)


def cached_bytes(tensor: Tensor) -> int:
    """Of a mapping, what the system's cache holds (mincore(2))."""
    pages = (ctypes.c_ubyte * -(-tensor.nbytes // mmap.PAGESIZE))()
    assert (
        ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), pages)
        == 0
    )
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


def resident_bytes(tensor: Tensor) -> int:
    """Of the mapping that begins with a tensor, as proc(5) tells it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    begin = next(line for line in lines if line.startswith(f"{tensor.data_ptr():x}-"))
    assert begin
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

"""What a program sets as torch's defaults, for its own tensors, changes no number here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import small
from usoflow.execution.executor import Executor
from usoflow.models import fp8, int8
from usoflow.models.embeddings import rotary_table
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.models.references import position_ids
from usoflow.nodes import registry
from usoflow.sampling.noise import initial_noise, step_noise
from usoflow.sampling.schedule import SCHEDULERS, FluxSchedule, sigmas, window
from usoflow.settings import find_folders
from usoflow.workflow.prompt import Prompt


@contextmanager
def set_to(default: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16 if default == "dtype" else before)
        torch.set_default_device("meta" if default == "device" else None)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


DEFAULTS = pytest.mark.parametrize("default", ["dtype", "device"])


@DEFAULTS
@pytest.mark.parametrize(
    "made",
    [
        lambda: initial_noise((1, 16, 4, 4), 1),
        lambda: initial_noise((2, 16, 4, 4), 1, batch_index=[1, 0]),
        lambda: step_noise(1)(initial_noise((1, 16, 4, 4), 1)),
        lambda: torch.cat([sigmas(name, 8, 0.7, schedule=FluxSchedule()) for name in sorted(SCHEDULERS)]),
        lambda: sigmas("linear_quadratic", 1, 1.0, schedule=FluxSchedule()),
        lambda: sigmas("simple", 8, 0.0, schedule=FluxSchedule()),
        lambda: window(sigmas("simple", 8, 1.0, schedule=FluxSchedule()), 2, 5, leftover=False),
        lambda: window(sigmas("simple", 8, 1.0, schedule=FluxSchedule()), 9, 9, leftover=False),
        lambda: position_ids((600, 6), [(8, 12)], "uxo"),
        lambda: torch.cat(rotary_table(position_ids((600, 6)), (16, 56, 56), 10_000)),
        lambda: fp8.row_scales(None, 3),
    ],
)
def test_what_is_made_from_nothing(default: str, made: Callable[[], Tensor]) -> None:
    expected = made()
    with set_to(default):
        found = made()
    assert (found.device, found.dtype) == (expected.device, torch.float32)
    assert torch.equal(found, expected)


@DEFAULTS
def test_products_in_int8(default: str) -> None:
    with set_to(default):
        assert int8.works()


@DEFAULTS
@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_a_whole_run(small_models: Path, tmp_path: Path, default: str, dtype: str) -> None:
    """Prompt, subject, style, LoRA, a sampler that draws noise, a part of the picture made anew."""
    prompt = small.with_style(small.subject())
    prompt = small.with_inputs(prompt, "sampler", sampler_name="euler_ancestral", latent_image=["encode", 0])
    folders = find_folders(
        models=small_models, inputs=small_models.parent / "input", output=tmp_path / "output"
    )

    def drawn() -> Tensor:
        executor = Executor(registry(), ModelLibrary(Placement.choose("cpu", dtype)))
        (saved,) = executor.run(Prompt.parse(prompt), ["save"], folders).shown["save"].images
        with Image.open(tmp_path / "output" / saved.filename) as image:
            return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)

    expected = drawn()
    with set_to(default):
        found = drawn()
    assert torch.equal(found, expected)

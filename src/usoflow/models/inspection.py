"""A model file looked at closely: tensors read, networks built, a LoRA matched with a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from usoflow.errors import UsoflowError, some
from usoflow.models import loading
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.inventory import precision
from usoflow.models.kinds import KIND_NAMES, SINGLE_FILES
from usoflow.models.lora_layouts import linear_layers, pairs_for
from usoflow.models.weights import read_tensors
from usoflow.settings import size_in_words

_LORAS = ("uso_lora", "lora")
_BUILDERS = {
    "flux": loading.load_flux,
    "clip_l": loading.load_clip,
    "t5": loading.load_t5,
    "siglip": loading.load_siglip,
    "vae": loading.load_vae,
    "uso_projector": loading.load_projector,
}


def inspect(path: Path, transformer: Component | None) -> Iterator[str]:
    """What a file is and whether it can be used, a line at a time.

    Args:
        path: any model file, safetensors or GGUF.
        transformer: what a LoRA is matched with; None leaves that out.

    Raises:
        UsoflowError: the first thing that is wrong: damaged file, tensor missing, unknown, of another shape
            or with values that are not finite (`model_values`), LoRA that does not fit.
    """
    file = TensorFile.open(path)
    held = precision(file.tensors.values())
    yield f"{path}: {size_in_words(file.bytes)}, {len(file.tensors)} tensors, {held}"
    components = file.components()
    if not components:
        advice = SINGLE_FILES if file.of_diffusers() else None
        raise UsoflowError("model_kind", f"{path.name} holds {file.describe()}.", remedy=advice)
    for kind, component in components.items():
        yield f"{KIND_NAMES[kind]}: {len(component.tensors)} tensors, prefix {component.prefix!r}"
        if kind in _LORAS:
            yield from _fit(component, transformer)
        else:
            _BUILDERS[kind](component)
            yield "  every tensor that the network needs is there, in its shape"
        _refuse_non_finite(component)
        yield "  every value is finite"


def _fit(lora: Component, transformer: Component | None) -> Iterator[str]:
    if transformer is None:
        yield "  there is no transformer to match it with; name one with --with"
        return
    pairs = pairs_for(lora, "flux", linear_layers(transformer))
    where = transformer.file.path.name
    if pairs.strange:
        yield f"  no low-rank pairs, and left out: {some(pairs.strange)}"
    if not pairs.total:
        yield "  nothing for the transformer: for text encoders only"
        return
    if not pairs.fitting:
        raise UsoflowError(
            "lora_mismatch", f"{lora.file.path.name}: none of its {pairs.total} layers is in {where}."
        )
    yield f"  fits {where}: {len(pairs.fitting)} of {pairs.total} layers"
    if pairs.absent:
        yield f"  without a layer there: {some(pairs.absent)}"
    if pairs.repeated:
        yield f"  left out, for others change the same rows: {some(pairs.repeated)}"


def _refuse_non_finite(component: Component) -> None:
    bad = [name for name in _to_be_finite(component) if not _finite(read_tensors(component, [name])[name])]
    if bad:
        raise UsoflowError(
            "model_values",
            f"{component.file.path.name}: {len(bad)} tensors have values that are not finite: {some(bad)}.",
        )


def _to_be_finite(component: Component) -> Iterator[str]:
    """All but T5's table in fp8, whose NaNs are read as 0 (`t5`): what was too large for fp8 became one."""
    for name, info in component.tensors.items():
        if not (component.kind == "t5" and name == "shared.weight" and info.dtype.startswith("F8")):
            yield name


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():  # also the bytes of a GGUF file
        return True
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.bfloat16)  # fp8 has no isfinite
    return bool(torch.isfinite(wide).all())

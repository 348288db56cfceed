"""What USO adds to a model handle: style references, and the step cache of its official workflow."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from usoflow.nodes.handles import StyleReference
from usoflow.nodes.sockets import ClipVisionOutput, Model, ModelPatch
from usoflow.schema.node import node
from usoflow.schema.specs import Float, Tip

_PERCENT = Float(min=0.0, max=1.0, step=0.01)


@node("USOStyleReference", category="advanced/model_patches/flux", experimental=True)
def style_reference(model: Model, model_patch: ModelPatch, clip_vision_output: ClipVisionOutput) -> Model:
    """Adds a style picture; several can follow each other."""
    style = StyleReference(model_patch.projector, clip_vision_output)
    return replace(model, styles=(*model.styles, style))


@node("EasyCache", category="advanced/debug/model", experimental=True)
def easy_cache(
    model: Model,
    reuse_threshold: Annotated[
        float, Float(min=0.0, max=3.0, step=0.01), Tip("How much change may be skipped.")
    ] = 0.2,
    start_percent: Annotated[
        float, _PERCENT, Tip("Part of the sampling before which no step is skipped.")
    ] = 0.15,
    end_percent: Annotated[
        float, _PERCENT, Tip("Part of the sampling after which no step is skipped.")
    ] = 0.95,
    verbose: Annotated[bool, Tip("Log which steps were skipped.")] = False,
) -> Model:
    """Skips steps whose result is close to that of the step before: faster, with some loss of detail."""
    from usoflow.sampling.step_cache import EasyCacheSettings

    settings = EasyCacheSettings(reuse_threshold, start_percent, end_percent, verbose)
    return replace(model, easy_cache=settings)

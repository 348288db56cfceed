"""Conditioning: text, vision, guidance and references become what the transformer is steered by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from usoflow.errors import UsoflowError
from usoflow.nodes.context import NodeContext
from usoflow.nodes.sockets import Clip, ClipVision, ClipVisionOutput, Conditioning, Image, Latent
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, Text, Tip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

REFERENCE_METHODS = Choice(
    ("offset", "index", "uxo/uno", "index_timestep_zero"),
    accepted=("uso",),  # what the official example pictures carry
)


@node("CLIPTextEncode", category="conditioning", display_name="CLIP Text Encode (Prompt)")
def encode_text(
    text: Annotated[str, Text(multiline=True, dynamic_prompts=True), Tip("What the picture shows.")],
    clip: Clip,
    *,
    context: NodeContext,
) -> Conditioning:
    """Encodes a prompt with both text encoders."""
    encoding = context.library.encode_text(clip.clip_l, clip.t5, text, loras=clip.loras, on_cpu=clip.on_cpu)
    return [(encoding.context, {"pooled_output": encoding.pooled})]


@node("CLIPTextEncodeFlux", category="advanced/conditioning/flux")
def encode_text_flux(
    clip: Clip,
    clip_l: Annotated[str, Text(multiline=True, dynamic_prompts=True)],
    t5xxl: Annotated[str, Text(multiline=True, dynamic_prompts=True)],
    guidance: Annotated[float, Float(min=0.0, max=100.0, step=0.1)] = 3.5,
    *,
    context: NodeContext,
) -> Conditioning:
    """Encodes a prompt for each text encoder, with the strength of the built-in guidance."""
    encoding = context.library.encode_text(
        clip.clip_l, clip.t5, t5xxl, clip_prompt=clip_l, loras=clip.loras, on_cpu=clip.on_cpu
    )
    return [(encoding.context, {"pooled_output": encoding.pooled, "guidance": guidance})]


@node("CLIPVisionEncode", category="conditioning", display_name="CLIP Vision Encode")
def encode_vision(
    clip_vision: ClipVision,
    image: Image,
    crop: Annotated[str, Choice(("center", "none"))],
    *,
    context: NodeContext,
) -> ClipVisionOutput:
    """Encodes a picture with the vision encoder."""
    return context.library.encode_vision(clip_vision.siglip, image, crop)


@node("ConditioningZeroOut", category="advanced/conditioning")
def zero_out(conditioning: Conditioning) -> Conditioning:
    """Zeroes the text; guidance and references stay."""
    import torch

    def zeroed(options: Mapping[str, Any]) -> dict[str, Any]:
        pooled = options.get("pooled_output")
        return {**options, "pooled_output": None if pooled is None else torch.zeros_like(pooled)}

    return [(torch.zeros_like(text), zeroed(options)) for text, options in conditioning]


@node("FluxGuidance", category="advanced/conditioning/flux")
def flux_guidance(
    conditioning: Conditioning,
    guidance: Annotated[float, Float(min=0.0, max=100.0, step=0.1)] = 3.5,
) -> Conditioning:
    """Sets the strength of FLUX's built-in guidance."""
    return with_option(conditioning, "guidance", guidance)


@node("ReferenceLatent", category="advanced/conditioning/edit_models")
def reference_latent(conditioning: Conditioning, latent: Latent | None = None) -> Conditioning:
    """Adds a reference picture, as a latent; several can follow each other."""
    if latent is None:
        return conditioning
    return [
        (text, {**options, "reference_latents": [*options.get("reference_latents", []), latent["samples"]]})
        for text, options in conditioning
    ]


@node(
    "FluxKontextMultiReferenceLatentMethod",
    category="advanced/conditioning/flux",
    display_name="Edit Model Reference Method",
    experimental=True,
)
def reference_method(
    conditioning: Conditioning, reference_latents_method: Annotated[str, REFERENCE_METHODS]
) -> Conditioning:
    """Chooses where references lie among the positions of the image; USO needs uxo/uno."""
    return with_option(conditioning, "reference_latents_method", reference_latents_method)


@node("FluxDisableGuidance", category="advanced/conditioning/flux")
def disable_guidance(conditioning: Conditioning) -> Conditioning:
    """Disables FLUX's built-in guidance."""
    return with_option(conditioning, "guidance", None)


@node("ConditioningCombine", category="conditioning", display_name="Conditioning (Combine)")
def combine(conditioning_1: Conditioning, conditioning_2: Conditioning) -> Conditioning:
    """Combines two conditionings: the model predicts for each, and the mean is taken."""
    return [*conditioning_1, *conditioning_2]


@node("ConditioningConcat", category="conditioning", display_name="Conditioning (Concat)")
def concat(conditioning_to: Conditioning, conditioning_from: Conditioning) -> Conditioning:
    """Appends one text's tokens to another's."""
    import torch

    appended = conditioning_from[0][0]
    _require_one_width(conditioning_to, appended)
    return [(torch.cat([text, appended], dim=1), options) for text, options in conditioning_to]


@node("ConditioningAverage", category="conditioning")
def average(
    conditioning_to: Conditioning,
    conditioning_from: Conditioning,
    conditioning_to_strength: Annotated[float, Float(min=0.0, max=1.0, step=0.01)] = 1.0,
) -> Conditioning:
    """Mixes two texts, token by token; a shorter one counts as zeros where it ends."""
    import torch
    from torch.nn import functional as F

    other, other_options = conditioning_from[0]
    _require_one_width(conditioning_to, other)
    other_pooled = other_options.get("pooled_output")

    def mixed(entry: tuple[Tensor, dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        text, options = entry
        fitted = F.pad(other, (0, 0, 0, text.shape[1] - other.shape[1]))  # [B, T, D], cut if it is longer
        options, pooled = dict(options), options.get("pooled_output")
        if other_pooled is not None:
            pooled = other_pooled if pooled is None else pooled
            options["pooled_output"] = torch.lerp(other_pooled, pooled, conditioning_to_strength)
        return torch.lerp(fitted, text, conditioning_to_strength), options

    return [mixed(entry) for entry in conditioning_to]


def _require_one_width(conditioning: Conditioning, other: Tensor) -> None:
    widths = {text.shape[-1] for text, _ in conditioning} | {other.shape[-1]}
    if len(widths) > 1:
        told = " and ".join(map(str, sorted(widths)))
        raise UsoflowError(
            "models_mismatch",
            f"The prompts come from different text encoders (widths {told}).",
        )


@node("ConditioningSetTimestepRange", category="advanced/conditioning")
def set_timestep_range(
    conditioning: Conditioning,
    start: Annotated[float, Float(min=0.0, max=1.0, step=0.001)] = 0.0,
    end: Annotated[float, Float(min=0.0, max=1.0, step=0.001)] = 1.0,
) -> Conditioning:
    """Lets a conditioning count during a part of the run only."""
    return with_option(with_option(conditioning, "start_percent", start), "end_percent", end)


def with_option(conditioning: Conditioning, name: str, value: object) -> Conditioning:
    """The conditioning with one option set in each of its entries."""
    return [(text, {**options, name: value}) for text, options in conditioning]

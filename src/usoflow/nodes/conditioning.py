"""Conditioning: text, vision, guidance and references become what the transformer is steered by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from usoflow.nodes.context import NodeContext
from usoflow.nodes.sockets import Clip, ClipVision, ClipVisionOutput, Conditioning, Image, Latent
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, Text, Tip

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    encoding = context.library.encode_text(clip.clip_l, clip.t5, text)
    return [(encoding.context, {"pooled_output": encoding.pooled})]


@node("CLIPVisionEncode", category="conditioning", display_name="CLIP Vision Encode")
def encode_vision(
    clip_vision: ClipVision,
    image: Image,
    crop: Annotated[str, Choice(("center", "none"))],
    *,
    context: NodeContext,
) -> ClipVisionOutput:
    """Shows a picture to the vision tower."""
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


def with_option(conditioning: Conditioning, name: str, value: object) -> Conditioning:
    """The conditioning with one option set in each of its entries."""
    return [(text, {**options, name: value}) for text, options in conditioning]

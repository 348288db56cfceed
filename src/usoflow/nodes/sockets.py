"""The types of a workflow's links, as annotations of node functions.

For a type checker they are what a link carries; at run time they only name the socket, so that importing the
nodes imports no torch. IMAGE is float32 [B, H, W, C] in 0..1, MASK float32 [B, H, W], LATENT a dict with
`samples` [B, C, H, W], CONDITIONING a list of (tensor, dict): the ecosystem's own types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from usoflow.schema.specs import Socket

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import Tensor

    from usoflow.models.vision import VisionOutput
    from usoflow.nodes.handles import (
        ClipHandle,
        ClipVisionHandle,
        GuiderHandle,
        ModelHandle,
        ModelPatchHandle,
        NoiseHandle,
        VaeHandle,
    )

    Image: TypeAlias = Tensor
    Mask: TypeAlias = Tensor
    Latent: TypeAlias = dict[str, Any]
    Conditioning: TypeAlias = list[tuple[Tensor, dict[str, Any]]]
    Model: TypeAlias = ModelHandle
    Clip: TypeAlias = ClipHandle
    Vae: TypeAlias = VaeHandle
    ClipVision: TypeAlias = ClipVisionHandle
    ClipVisionOutput: TypeAlias = VisionOutput
    ModelPatch: TypeAlias = ModelPatchHandle
    Guider: TypeAlias = GuiderHandle
    Noise: TypeAlias = NoiseHandle
    Sampler: TypeAlias = str  # a key of `sampling.samplers.SAMPLERS`
    Sigmas: TypeAlias = Tensor  # float32 [steps + 1], descending
else:
    Image = Annotated[Any, Socket("IMAGE")]
    Mask = Annotated[Any, Socket("MASK")]
    Latent = Annotated[Any, Socket("LATENT")]
    Conditioning = Annotated[Any, Socket("CONDITIONING")]
    Model = Annotated[Any, Socket("MODEL")]
    Clip = Annotated[Any, Socket("CLIP")]
    Vae = Annotated[Any, Socket("VAE")]
    ClipVision = Annotated[Any, Socket("CLIP_VISION")]
    ClipVisionOutput = Annotated[Any, Socket("CLIP_VISION_OUTPUT")]
    ModelPatch = Annotated[Any, Socket("MODEL_PATCH")]
    Guider = Annotated[Any, Socket("GUIDER")]
    Noise = Annotated[Any, Socket("NOISE")]
    Sampler = Annotated[Any, Socket("SAMPLER")]
    Sigmas = Annotated[Any, Socket("SIGMAS")]

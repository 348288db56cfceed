"""What travels between nodes as MODEL, CLIP, VAE, ...: small frozen handles on shared weights.

A loader makes a handle from the header of a file; adapters (LoRA, style reference, EasyCache) return a new
handle with one more; the nodes that compute get the modules from the model library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from usoflow.models.checkpoint import Component
    from usoflow.models.lora_layouts import LoraUse
    from usoflow.models.vision import VisionOutput
    from usoflow.sampling.step_cache import EasyCacheSettings


@dataclass(frozen=True, eq=False, slots=True)
class StyleReference:
    """A style picture as the vision tower sees it, and the projector that makes tokens of that."""

    projector: Component
    vision: VisionOutput


@dataclass(frozen=True, eq=False, slots=True)
class ModelHandle:
    """MODEL: a transformer, how its weights are held, and what was added to it.

    Attributes:
        flux: the transformer's tensors.
        weight_dtype: how its weights are held, "default" or "fp8_e4m3fn" (`ModelLibrary.flux`).
        loras: applied together.
        styles: in the order of the chain.
        easy_cache: skips steps, if set.
        shift: of the noise schedule; None takes the model's own.
    """

    flux: Component
    weight_dtype: str = "default"
    loras: tuple[LoraUse, ...] = ()
    styles: tuple[StyleReference, ...] = ()
    easy_cache: EasyCacheSettings | None = None
    shift: float | None = None


@dataclass(frozen=True, eq=False, slots=True)
class ClipHandle:
    """CLIP: the two text encoders of FLUX, and the LoRAs of which their parts are applied."""

    clip_l: Component
    t5: Component
    loras: tuple[LoraUse, ...] = ()
    on_cpu: bool = False  # whatever else there is


@dataclass(frozen=True, eq=False, slots=True)
class VaeHandle:
    """VAE."""

    vae: Component


@dataclass(frozen=True, eq=False, slots=True)
class ClipVisionHandle:
    """CLIP_VISION: the vision tower."""

    siglip: Component


@dataclass(frozen=True, eq=False, slots=True)
class ModelPatchHandle:
    """MODEL_PATCH: the USO style projector."""

    projector: Component


@dataclass(frozen=True, eq=False, slots=True)
class GuiderHandle:
    """GUIDER: a model and what it is asked for.

    Attributes:
        model: transformer and adapters.
        positive: what is wanted.
        negative: what is not; None, or not evaluated where `cfg` is 1.
        cfg: strength of the difference.
    """

    model: ModelHandle
    positive: list[tuple[Tensor, dict[str, Any]]]
    negative: list[tuple[Tensor, dict[str, Any]]] | None = None
    cfg: float = 1.0


@dataclass(frozen=True, slots=True)
class NoiseHandle:
    """NOISE: what is drawn from a seed, for a latent (if `initial`) and by stochastic samplers."""

    seed: int
    initial: bool = True

"""How latents are scaled: what the VAE makes, and what the transformer is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from usoflow.models.checkpoint import Component

if TYPE_CHECKING:
    from torch import Tensor

OFFICIAL_SCALE = 0.3611
OFFICIAL_SHIFT = 0.1159


@dataclass(frozen=True, slots=True)
class LatentFormat:
    """The affine map between the VAE's latents and what the diffusion model sees."""

    scale: float = OFFICIAL_SCALE
    shift: float = OFFICIAL_SHIFT

    @classmethod
    def from_component(cls, component: Component) -> LatentFormat:
        """The declared `scale` and `shift`, else FLUX.1's."""
        return cls(
            scale=component.setting("scale", OFFICIAL_SCALE),
            shift=component.setting("shift", OFFICIAL_SHIFT),
        )

    def to_model(self, z: Tensor) -> Tensor:
        """VAE latent to model latent; same shape."""
        return (z - self.shift) * self.scale

    def from_model(self, x: Tensor) -> Tensor:
        """Model latent to VAE latent; same shape."""
        return x / self.scale + self.shift

"""The sizes of a FLUX.1 transformer, as its file's header tells them, and whether usoflow can run it.

Without torch, so that the command line can ask. Architecture: black-forest-labs/flux, src/flux/model.py
(Apache-2.0), whose parameters are `FluxParams`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component

PATCH = 2  # latent pixels per token side
OFFICIAL_DEPTH = (19, 38)  # double, single blocks of FLUX.1


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX transformer; the defaults are what no tensor shape tells, at the official values."""

    hidden: int
    text_dim: int
    pooled_dim: int
    mlp_dim: int
    channels: int
    double_blocks: int
    single_blocks: int
    guidance: bool
    head_dim: int = 128
    axes: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000

    @classmethod
    def from_component(cls, component: Component) -> Self:
        """Widths and depths from tensor shapes, rope axes and theta from the file's declaration.

        Raises:
            UsoflowError: `model_damaged`, `tensor_missing`, `tensor_shape`, `block_gap`;
                `model_unsupported` if it is one that usoflow does not run: quantised by bitsandbytes, or one
                of FLUX.1's tools.
        """
        if any(name.endswith(".absmax") for name in component.tensors):
            raise UsoflowError(
                "model_unsupported",
                f"{component.file.path.name} is quantised by bitsandbytes (NF4 or FP4).",
                remedy="Use a file in fp8, or a GGUF file of about that size (Q4_0, Q4_K_S).",
            )
        hidden, patch_dim = component.shape("img_in.weight", 2)
        axes = component.setting("axes", cls.axes)
        config = cls(
            hidden=hidden,
            text_dim=component.shape("txt_in.weight", 2)[1],
            pooled_dim=component.shape("vector_in.in_layer.weight", 2)[1],
            mlp_dim=component.shape("double_blocks.0.img_mlp.0.weight", 2)[0],
            channels=patch_dim // PATCH**2,
            double_blocks=component.count("double_blocks.{}."),
            single_blocks=component.count("single_blocks.{}."),
            guidance="guidance_in.in_layer.weight" in component.tensors,
            head_dim=component.shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)[0],
            axes=axes,
            theta=component.setting("theta", cls.theta),
        )
        made = component.shape("final_layer.linear.weight", 2)[0] // PATCH**2
        config._check(component.file.path.name, made)
        return config

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    def _check(self, file: str, made: int) -> None:
        if self.hidden % self.head_dim or sum(self.axes) != self.head_dim or any(a % 2 for a in self.axes):
            raise UsoflowError(
                "model_unsupported",
                f"{file}: width {self.hidden}, head dim {self.head_dim}, rope axes {self.axes} do not fit.",
            )
        if self.channels != made:
            raise UsoflowError(
                "model_unsupported",
                f"{file} takes {self.channels} channels and makes {made}: it is one of FLUX.1's tools (Fill,"
                " Canny, Depth), which are given a picture or a mask beside the latent.",
                remedy="Use FLUX.1 [dev], [schnell], Krea or Kontext.",
            )


def runs(flux: Component) -> bool:
    """Whether usoflow can run this transformer."""
    try:
        FluxConfig.from_component(flux)
    except UsoflowError:
        return False
    return True

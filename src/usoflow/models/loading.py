"""A component of a file as the network that it is, on the CPU: its weights stay pages of the file."""

from __future__ import annotations

import logging

from usoflow.models import clip, t5, vision
from usoflow.models.checkpoint import Component
from usoflow.models.clip import ClipText, ClipTextConfig
from usoflow.models.flux import Flux
from usoflow.models.flux_config import OFFICIAL_DEPTH, FluxConfig
from usoflow.models.style_projector import StyleProjector, StyleProjectorConfig
from usoflow.models.t5 import T5Config, T5Encoder
from usoflow.models.tokens import ClipTokenizer, T5Tokenizer, Tokenizers
from usoflow.models.vae import AutoEncoder, VaeConfig
from usoflow.models.vision import SiglipConfig, SiglipVision
from usoflow.models.weights import build

logger = logging.getLogger(__name__)


def load_flux(component: Component) -> Flux:
    """The transformer of a file, on the CPU; says so if it has fewer blocks than FLUX.1."""
    config = FluxConfig.from_component(component)
    depth = (config.double_blocks, config.single_blocks)
    if depth < OFFICIAL_DEPTH and not component.declared:
        logger.warning(
            "%s is shallow: %d double and %d single blocks (FLUX.1 has %d and %d).",
            component.file.path.name, *depth, *OFFICIAL_DEPTH,
        )  # fmt: skip
    return build(component, lambda: Flux(config))


def load_clip(component: Component) -> ClipText:
    """The CLIP-L text encoder of a file."""
    config = ClipTextConfig.from_component(component)
    return build(component, lambda: ClipText(config), ignored=clip.IGNORED)


def load_t5(component: Component) -> T5Encoder:
    """The T5 text encoder of a file."""
    config = T5Config.from_component(component)
    return build(component, lambda: T5Encoder(config), ignored=t5.IGNORED)


def load_siglip(component: Component) -> SiglipVision:
    """The vision tower of a file."""
    config = SiglipConfig.from_component(component)
    return build(component, lambda: SiglipVision(config), ignored=vision.IGNORED)


def load_vae(component: Component) -> AutoEncoder:
    """The VAE of a file."""
    config = VaeConfig.from_component(component)
    return build(component, lambda: AutoEncoder(config))


def load_projector(component: Component) -> StyleProjector:
    """The USO style projector of a file."""
    config = StyleProjectorConfig.from_component(component)
    return build(component, lambda: StyleProjector(config))


def tokenizers_of(clip: ClipText, t5: T5Encoder) -> Tokenizers:
    """The tokenizers for two encoders: as long as they can take, as short as they were trained with."""
    return Tokenizers(
        ClipTokenizer(length=clip.config.positions), T5Tokenizer(min_length=t5.config.min_length)
    )

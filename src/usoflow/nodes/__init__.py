"""The nodes of a workflow: thin typed functions, one file per menu group. Importing them imports no torch."""

from __future__ import annotations

import functools

from usoflow.schema.node import NodeRegistry


@functools.cache
def registry() -> NodeRegistry:
    """Every node type that usoflow has."""
    from usoflow.nodes import (
        conditioning,
        custom_sampling,
        image,
        image_scaling,
        image_transform,
        latent,
        latent_batch,
        loaders,
        mask,
        output,
        primitive,
        sampling,
        uso,
    )

    return NodeRegistry.from_modules(
        [
            loaders,
            conditioning,
            image,
            image_scaling,
            image_transform,
            mask,
            latent,
            latent_batch,
            sampling,
            custom_sampling,
            uso,
            primitive,
            output,
        ]
    )

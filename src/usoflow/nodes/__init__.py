"""The nodes of a workflow: thin typed functions, one file per menu group. Importing them imports no torch."""

from __future__ import annotations

import functools

from usoflow.schema.node import NodeRegistry


@functools.cache
def registry() -> NodeRegistry:
    """Every node type that usoflow has."""
    from usoflow.nodes import conditioning, image, latent, loaders, primitive, sampling, uso

    return NodeRegistry.from_modules([loaders, conditioning, image, latent, sampling, uso, primitive])

"""Blocks of a transformer compiled, not the whole network: each type once, for all blocks of the type.

Never before a first picture: what is asked for in one run is computed eagerly, and only where a later run
asks blocks of the same kinds for the same shapes, they are compiled, though the network may have been loaded
anew. The compiler (torch.compile with Inductor) keeps what it made on disk, for other processes. Hooks of
blocks are outside of what is compiled.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from usoflow.models.flux import Block, Flux, FluxInputs
from usoflow.models.placement import is_out_of_memory
from usoflow.settings import compiled_folder

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # Inductor's own: where it keeps what it made
NEVER = sys.maxsize
VARIANTS = 64  # of a block: sizes of pictures, ranks of LoRAs; torch's own limit is 8
TOO_MANY = ("FailOnRecompileLimitHit", "RecompileLimitExceeded")  # torch's errors; of 2.6 the second
OF_A_NETWORK = 8  # kinds of blocks that are compiled: two, more where a LoRA is for some of them only
# Rounded to bf16 wherever it is eagerly: nearer to the first picture, and what is scaled to fp8 is scaled by
# the very factor that its product is divided by.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}

Kinds = frozenset[tuple[Any, ...]]  # of blocks: types, and what their parameters are like
Shapes = tuple[Any, ...]


class Regions:
    """Decides for each step whether its blocks are computed eagerly or compiled, and compiles them."""

    def __init__(self) -> None:
        self._run = 0
        self._kinds: WeakKeyDictionary[nn.Module, Kinds] = WeakKeyDictionary()
        self._first: dict[tuple[Kinds, Shapes], int] = {}  # run of each
        self._now: tuple[Kinds, Shapes] = frozenset(), ()
        self._since = NEVER  # run in which what is computed now was asked for first
        self._compiled: dict[type[Block], Callable[..., Any]] = {}
        self._failed = False

    def begin_run(self) -> None:
        """What was asked for before this may be compiled from now on."""
        self._run += 1

    def attach(self, flux: Flux) -> None:
        """Let a network's blocks be computed here; modules that share its hooks too."""
        flux.register_forward_pre_hook(self._look)

    def _look(self, flux: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before a step: take note of its shapes."""
        assert isinstance(flux, Flux)
        if flux not in self._kinds:
            self._kinds[flux] = kinds = _kinds(flux.blocks)
            if len(kinds) > OF_A_NETWORK:
                logger.info(
                    "Blocks of %d kinds (by ranks of LoRAs) are computed without the compiler.", len(kinds)
                )
        self._now = self._kinds[flux], _shapes(*inputs)
        many = len(self._kinds[flux]) > OF_A_NETWORK
        self._since = self._first.setdefault(self._now, NEVER if many else self._run)
        if self._since < self._run:  # not before: to touch it imports the compiler
            os.environ.setdefault(CACHE_VARIABLE, str(compiled_folder()))
            torch._dynamo.config.cache_size_limit = VARIANTS  # since torch 2.12 each thread has its own
        for block in flux.blocks:
            block.way = self._compute

    def _compute(self, block: Block, *inputs: Any) -> Any:
        if self._since < self._run:
            try:
                return self._compiled_or_anew(block, *inputs)
            except Exception as error:  # the compiler's are of many kinds
                if is_out_of_memory(error):
                    raise
                self._first[self._now] = self._since = NEVER
                self._warn(error)
        return block.compute(*inputs)

    def _compiled_or_anew(self, block: Block, *inputs: Any) -> Any:
        """Where there are as many variants as torch keeps, all are made anew when they are needed."""
        try:
            return self._of(type(block))(block, *inputs)
        except Exception as error:
            if type(error).__name__ not in TOO_MANY:
                raise
        torch.compiler.reset()
        return self._of(type(block))(block, *inputs)

    def _of(self, kind: type[Block]) -> Callable[..., Any]:
        if kind not in self._compiled:
            logger.info("%s: compiled now, which takes a while once.", kind.__name__)
            self._compiled[kind] = torch.compile(kind.compute, dynamic=False, fullgraph=True, options=OPTIONS)
        return self._compiled[kind]

    def _warn(self, error: Exception) -> None:
        """Once, however often it fails."""
        if not self._failed:
            inner = getattr(error, "inner_exception", error)  # what the compiler itself said
            reason = str(inner).strip().partition("\n")[0]
            logger.warning(
                "The compiler failed, blocks are computed without it: %s: %s", type(inner).__name__, reason
            )
        self._failed = True


def _kinds(blocks: Iterable[Block]) -> Kinds:
    """Each needs a variant of code of its own: a LoRA may have another rank for each layer."""
    return frozenset((type(block), *((p.shape, p.dtype) for p in block.parameters())) for block in blocks)


def _shapes(latent: torch.Tensor, _sigma: torch.Tensor, inputs: FluxInputs) -> Shapes:
    """What blocks are specialised for."""
    references = None if inputs.references is None else inputs.references.shape
    return latent.shape, inputs.text.shape, references, inputs.text.dtype

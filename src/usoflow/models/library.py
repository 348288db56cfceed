"""Models by file, each built once: what loader nodes name, nodes that compute get here.

Keeps one module for each component of a file and, for the transformer, one view for the LoRAs in use, which
shares the weights. Encoders and VAE are on the device only while they compute (`placement`).
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from usoflow.models import fp8, pages, vae
from usoflow.models.checkpoint import Component
from usoflow.models.clip import ClipText
from usoflow.models.finite import require_finite
from usoflow.models.flux import Flux
from usoflow.models.loading import (
    load_clip,
    load_flux,
    load_projector,
    load_siglip,
    load_t5,
    load_vae,
    tokenizers_of,
)
from usoflow.models.lora import attach
from usoflow.models.lora_layouts import LoraUse, is_for_text
from usoflow.models.passage import give_back_pinned
from usoflow.models.placement import Placement
from usoflow.models.regions import Regions
from usoflow.models.residence import stored_bytes
from usoflow.models.style_projector import LEVELS
from usoflow.models.t5 import T5Encoder
from usoflow.models.text import TextEncoding, encode_prompt
from usoflow.models.tiling import Grid, tiled
from usoflow.models.vision import VisionOutput, preprocess
from usoflow.models.weights import Linear
from usoflow.settings import size_in_words

logger = logging.getLogger(__name__)

KEPT_ENCODINGS, KEPT_BYTES = 16, 1 << 30  # of prompts and pictures; a picture has up to 13 MB
M = TypeVar("M", bound=nn.Module)
E = TypeVar("E")
L = TypeVar("L", Flux, ClipText, T5Encoder)  # what LoRAs are for
Key = tuple[Any, ...]  # fingerprint of the file, kind of component, variant


class ModelLibrary:
    """The models of one process, on one device.

    Attributes:
        placement: which device computes, in which dtype.
        check: called between the parts of long work; what it raises ends that.
        used: kinds of the models that were asked for since this was emptied last.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = self._asked = placement
        self._modules: dict[Key, nn.Module] = {}
        self._views: dict[str, tuple[Key, nn.Module]] = {}  # by role: the last LoRAs in use
        self._encodings: OrderedDict[Key, Any] = OrderedDict()  # of prompts and pictures, the last used last
        self._regions = Regions()
        self.check: Callable[[], None] = _go_on
        self.used: set[str] = set()

    def begin_run(self, check: Callable[[], None] | None = None) -> None:
        """Another run begins: shapes that a run before it had may be compiled for (`regions`)."""
        self._regions.begin_run()
        self.check = check or _go_on

    def encode_text(
        self,
        clip_l: Component,
        t5: Component,
        prompt: str,
        *,
        clip_prompt: str | None = None,
        loras: tuple[LoraUse, ...] = (),
        on_cpu: bool = False,
    ) -> TextEncoding:
        """A prompt (another one for CLIP, if given) through both text encoders, to fp32.

        Of the LoRAs, what is for text encoders is applied. What was encoded before is known: the encoders'
        files are then not even opened. With `on_cpu` the CPU computes, whatever else there is.
        """
        loras = tuple(use for use in loras if use.strength != 0 and is_for_text(use.lora))
        used = tuple((_key(use.lora), use.strength) for use in loras)
        key = ("text", _key(clip_l), _key(t5), prompt, clip_prompt, used, on_cpu)
        found = self._encoded(key, lambda: self._encode_text(clip_l, t5, prompt, clip_prompt, loras, on_cpu))
        return TextEncoding(found.context.clone(), found.pooled.clone())  # custom nodes may change theirs

    def _encode_text(
        self,
        clip_l: Component,
        t5: Component,
        prompt: str,
        clip_prompt: str | None,
        loras: tuple[LoraUse, ...],
        on_cpu: bool,
    ) -> TextEncoding:
        clip_module = self._with_loras("clip_l", self._module(clip_l, load_clip), loras)
        t5_module = self._with_loras("t5", self._module(t5, self._interruptible_t5), loras)
        tokenizers = tokenizers_of(clip_module, t5_module)
        clip_lent = self._borrowed(clip_module, on_cpu=on_cpu)
        with clip_lent, self._borrowed(t5_module, t5_module.blocks, on_cpu=on_cpu):
            return encode_prompt(prompt, clip_module, t5_module, tokenizers, clip_text=clip_prompt)

    def encode_vision(self, siglip: Component, images: Tensor, crop: str) -> VisionOutput:
        """Pictures [B, H, W, C] in 0..1 through the vision tower, in fp32; `crop` is "center" or "none"."""

        def encode() -> VisionOutput:
            module = self._module(siglip, load_siglip)
            with self._borrowed(module) as placement:
                pixels = preprocess(images, module.config.image_size, crop)
                seen = module(pixels.to(placement.device), tuple(LEVELS.values()))
                return VisionOutput({layer: state.cpu() for layer, state in seen.hidden.items()})

        return self._encoded(("vision", _key(siglip), crop, _content(images)), encode)

    def vae_encode(self, component: Component, images: Tensor) -> Tensor:
        """Pictures [B, H, W, C] to latents [B, 16, h, w], unscaled."""
        key = ("vae", _key(component), _content(images))
        found = self._encoded(key, lambda: self.vae_encode_once(component, images))
        return found.clone()  # custom nodes may change theirs

    def vae_encode_once(
        self, component: Component, images: Tensor, *, tiles: Grid | None = None, on_cpu: bool = False
    ) -> Tensor:
        """The same for what will not be asked for again: it is not kept. Some ask for it in tiles."""
        module = self._module(component, load_vae)
        side = _least_tile(tiles) * module.config.factor
        work = module.encoding_bytes(images[:, :side, :side], self.placement.vae_dtype)
        with self._borrowed(module, work=work, on_cpu=on_cpu) as placement:

            def encode(planes: Tensor) -> Tensor:
                pictures = planes.movedim(1, -1)
                return module.encode(
                    pictures, dtype=placement.vae_dtype, room=placement.room, between=self.check
                )

            return tiled(encode, images.movedim(-1, 1), tiles)

    def vae_decode(self, component: Component, latents: Tensor, *, tiles: Grid | None = None) -> Tensor:
        """Latents [B, 16, h, w], unscaled, to pictures [B, H, W, 3] in 0..1. Some ask for it in tiles."""
        module = self._module(component, load_vae)
        side = _least_tile(tiles)
        work = module.decoding_bytes(latents[..., :side, :side], self.placement.vae_dtype)
        with self._borrowed(module, work=work) as placement:

            def decode(latents: Tensor) -> Tensor:
                pictures = module.decode(
                    latents, dtype=placement.vae_dtype, room=placement.room, between=self.check
                )
                return pictures.movedim(-1, 1)

            return tiled(decode, latents, tiles).movedim(1, -1).contiguous()

    def style_tokens(self, projector: Component, states: Mapping[int, Tensor]) -> Tensor:
        """Hidden states of the vision tower, by layer, to style tokens [B, tokens, hidden]."""

        def project() -> Tensor:
            module = self._module(projector, load_projector)
            with self._borrowed(module) as placement:
                on_device = {layer: state.to(placement.device) for layer, state in states.items()}
                return require_finite(module(on_device).cpu(), "The style projector")

        seen = tuple((layer, _content(state)) for layer, state in states.items())
        return self._encoded(("style", _key(projector), seen), project)

    def flux(self, component: Component, loras: tuple[LoraUse, ...], weight_dtype: str) -> Flux:
        """The transformer with these LoRAs, on the device to stay.

        Args:
            component: its tensors.
            loras: applied together.
            weight_dtype: "default" is laid as `Placement.settle` does it; "fp8_e4m3fn" is narrowed, where
                there is memory for that, and never widened for good.

        Raises:
            UsoflowError: what is wrong with the file, or `lora_mismatch`.
        """
        base = self._module(component, lambda c: self._resident_flux(c, weight_dtype), weight_dtype)
        return self._with_loras("flux", base, loras)

    def clear(self) -> None:
        """Forget every model and encoding, and give the memory back; what ran out once may be there again."""
        self._encodings.clear()
        self.forget_models()
        self.placement = self._asked

    @property
    def holds_models(self) -> bool:
        """Whether there is anything that could be smaller."""
        return bool(self._modules)

    def make_smaller(self) -> None:
        """After memory ran out: forget the models, and load them with half of the memory for weights.

        That remains so until `clear`, or until there is another `plan`.
        """
        self.forget_models()
        self.placement = self.placement.smaller
        most = size_in_words(self.placement.weight_bytes)
        logger.warning("Memory ran out: once more, with at most %s for the transformer's weights.", most)

    def plan(self, placement: Placement) -> None:
        """Load models by another plan from now on: those that are here are forgotten."""
        self.forget_models()
        self.placement = placement

    def forget_models(self) -> None:
        """Give the models' memory back; they are loaded again when they are needed."""
        self._modules, self._views = {}, {}
        self._give_back()

    def _give_back(self) -> None:
        pages.trim()
        if self.placement.device.type == "cuda":
            torch.cuda.empty_cache()
            give_back_pinned()

    def _forget_transformers(self) -> None:
        """The budget is for one."""
        self._modules = {key: m for key, m in self._modules.items() if not isinstance(m, Flux)}
        self._views.pop("flux", None)
        self._give_back()

    @contextmanager
    def _borrowed(
        self, module: nn.Module, blocks: Sequence[nn.Module] = (), *, work: int = 0, on_cpu: bool = False
    ) -> Iterator[Placement]:
        """Put a module on the device for a while (`Placement.borrow`); yields where it is.

        What does not fit beside the transformer, with the `work` bytes that the computation needs at least,
        comes in its place. What would not fit there either is computed by the CPU.
        """
        weights = stored_bytes(module)
        if not (on_cpu or self.placement.fits(weights + work)):
            there = self._transformer_bytes()
            if on_cpu := not self.placement.fits(weights, freed=there):
                logger.info("%s does not fit on the device: the CPU computes it.", type(module).__name__)
            elif there:
                self._forget_transformers()
        placement = self.placement.on_cpu if on_cpu else self.placement
        with placement.borrow(module, blocks):
            yield placement

    def _transformer_bytes(self) -> int:
        """Of the transformers' weights on the device."""
        held = (m for m in self._modules.values() if isinstance(m, Flux))
        here = self.placement.device.type
        return sum(p.nbytes for module in held for p in module.parameters() if p.device.type == here)

    def _encoded(self, key: Key, encode: Callable[[], E]) -> E:
        """What is known under this key, else what `encode` gives. Not to be changed."""
        found = self._encodings.pop(key) if key in self._encodings else encode()
        self._encodings[key] = found
        sizes = [_bytes(kept) for kept in self._encodings.values()]
        while len(sizes) > 1 and (len(sizes) > KEPT_ENCODINGS or sum(sizes) > KEPT_BYTES):
            self._encodings.popitem(last=False)
            del sizes[0]
        return cast(E, found)

    def _module(self, component: Component, load: Callable[[Component], M], *variant: str) -> M:
        self.used.add(component.kind)
        key = (*_key(component), *variant)
        if key not in self._modules:
            self.check()
            self._forget_older(component)
            self._modules[key] = load(component)
            self.check()
        return cast(M, self._modules[key])

    def _forget_older(self, component: Component) -> None:
        """Drop what was loaded from the same path before the file changed."""
        state = component.file.fingerprint
        kept = {key: m for key, m in self._modules.items() if key[0][0] != state[0] or key[0] == state}
        if len(kept) < len(self._modules):
            self._modules, self._views = kept, {}

    def _resident_flux(self, component: Component, weight_dtype: str) -> Flux:
        self._forget_transformers()
        module = load_flux(component)
        if weight_dtype == "fp8_e4m3fn":
            self._narrow(module)
        self.placement.settle(module, module.blocks, as_stored=weight_dtype != "default")
        self._stop_between(module.blocks)
        if self.placement.compiled:
            self._regions.attach(module)
        return module

    def _interruptible_t5(self, component: Component) -> T5Encoder:
        module = load_t5(component)
        self._stop_between(module.blocks)
        return module

    def _stop_between(self, blocks: Iterable[nn.Module]) -> None:
        """Ask before each block whether to stop: on a CPU a step may take minutes, a prompt half of one."""
        for block in blocks:
            block.register_forward_pre_hook(lambda _module, _inputs: self.check())

    def _narrow(self, module: Flux) -> None:
        """Hold the weights of the blocks in fp8, without a scale (as `weight_dtype` has it in ComfyUI).

        Not without the memory for them: pages of the file can pass through instead, copies cannot. Nor on
        Apple's GPUs, which have no fp8.
        """
        layers = [
            layer
            for block in module.blocks
            for layer in block.modules()
            if isinstance(layer, Linear) and _can_be_narrowed(layer)
        ]
        needed, room = sum(layer.weight.numel() for layer in layers), self.placement.room_for_copies
        if needed > room:
            told = "fp8 copies of the weights would take %s, and there are %s: they stay as stored."
            logger.warning(told, size_in_words(needed), size_in_words(room))
            return
        for layer in layers:
            self.check()
            layer.weight = nn.Parameter(layer.weight.to(fp8.STORED), requires_grad=False)

    def _with_loras(self, role: str, base: L, loras: tuple[LoraUse, ...]) -> L:
        """The network with the branches of these LoRAs, around the same weights."""
        loras = tuple(use for use in loras if use.strength != 0)
        if not loras:
            self._views.pop(role, None)  # the branches of before take memory
            return base
        key = (base, *((_key(use.lora), use.strength) for use in loras))
        if role not in self._views or self._views[role][0] != key:
            self._views.pop(role, None)
            view = _view(base)
            for use in loras:
                # Those of text encoders come and go with them.
                device = self.placement.device if role == "flux" else None
                attach(view, use.lora, use.strength, role=role, device=device)
            self._views[role] = key, view
        return cast(L, self._views[role][1])


def _view(base: L) -> L:
    """A module of its own that shares the weights."""
    with torch.device("meta"):
        view: L = type(base)(base.config)
    for (name, parameter), layer in zip(base.named_parameters(), _owners(view), strict=True):
        setattr(layer, name.rpartition(".")[2], parameter)
    for ours, theirs in zip(view.modules(), base.modules(), strict=True):
        ours._forward_pre_hooks.update(theirs._forward_pre_hooks)  # by which blocks' weights come and go
        ours._forward_hooks.update(theirs._forward_hooks)
        if isinstance(ours, Linear) and isinstance(theirs, Linear):
            ours.share_storage(theirs)
    return view.eval()


def _content(values: Tensor) -> Key:
    """What tells pictures, or what was seen in them, apart: shape, and a digest of every value."""
    data = values.detach().cpu().contiguous()
    return tuple(data.shape), hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()


def _bytes(encoding: Tensor | TextEncoding | VisionOutput) -> int:
    match encoding:
        case TextEncoding():
            return encoding.context.nbytes + encoding.pooled.nbytes
        case VisionOutput():
            return sum(state.nbytes for state in encoding.hidden.values())
    return encoding.nbytes


def _can_be_narrowed(layer: Linear) -> bool:
    """Not what has a scale: it is narrow already, and may be larger than fp8's largest number."""
    return layer.quantised is None and layer.scale_weight is None and layer.weight.dtype != fp8.STORED


def _least_tile(tiles: Grid | None) -> int:
    """Side in latents of what the VAE must have room for, in such tiles or in those it makes by itself."""
    return vae.GOOD_TILE if tiles is None else min(vae.GOOD_TILE, tiles.tile)


def _go_on() -> None:
    """Where nothing is asked between the parts of long work."""


def _key(component: Component) -> Key:
    return component.file.fingerprint, component.kind


def _owners(module: nn.Module) -> list[nn.Module]:
    """The submodule that holds each parameter, in the order of `named_parameters`."""
    return [module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_parameters()]

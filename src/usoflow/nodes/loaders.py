"""Loaders: from a file name to a handle. Only headers are read here; weights come when they are needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from usoflow.catalogue import missing_file_remedy
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.flux_config import FluxConfig
from usoflow.models.lora_layouts import LoraUse, refuse_other_methods
from usoflow.nodes.context import NodeContext
from usoflow.nodes.handles import (
    ClipHandle,
    ClipVisionHandle,
    ModelHandle,
    ModelPatchHandle,
    VaeHandle,
)
from usoflow.nodes.sockets import Clip, ClipVision, Model, ModelPatch, Vae
from usoflow.schema.node import node
from usoflow.schema.specs import Choice, Float, ModelFile, Optional, Tip

_STRENGTH = Float(min=-100.0, max=100.0, step=0.01)


@node("CheckpointLoaderSimple", category="loaders", display_name="Load Checkpoint")
def load_checkpoint(
    ckpt_name: Annotated[
        str, ModelFile("checkpoints"), Tip("A file with transformer, text encoders and VAE.")
    ],
    *,
    context: NodeContext,
) -> tuple[Model, Clip, Vae]:
    """Loads an all-in-one checkpoint: transformer, both text encoders and VAE."""
    file = _open(context, "checkpoints", ckpt_name)
    model = ModelHandle(_transformer(file))
    if not {"clip_l", "t5", "vae"} <= set(file.components()):
        raise UsoflowError(
            "model_kind",
            f"{ckpt_name} holds only {file.describe()}.",
            remedy="Load the transformer with UNETLoader (its file belongs into diffusion_models), the text"
            " encoders with DualCLIPLoader and the VAE with VAELoader.",
        )
    clip = ClipHandle(file.component("clip_l"), file.component("t5"))
    return model, clip, VaeHandle(file.component("vae"))


@node("UNETLoader", category="advanced/loaders", display_name="Load Diffusion Model")
def load_diffusion_model(
    unet_name: Annotated[str, ModelFile("diffusion_models")],
    weight_dtype: Annotated[str, Choice(("default", "fp8_e4m3fn"), accepted=("fp8_e4m3fn_fast",))],
    *,
    context: NodeContext,
) -> Model:
    """Loads a transformer by itself. fp8_e4m3fn halves the memory of its weights."""
    component = _transformer(_open(context, "diffusion_models", unet_name))
    return ModelHandle(component, weight_dtype=weight_dtype.removesuffix("_fast"))


@node("UnetLoaderGGUF", category="bootleg", display_name="Unet Loader (GGUF)")
def load_gguf(unet_name: Annotated[str, ModelFile("diffusion_models")], *, context: NodeContext) -> Model:
    """Loads a quantised transformer, as github.com/city96/ComfyUI-GGUF's node of this name does."""
    return ModelHandle(_transformer(_open(context, "diffusion_models", unet_name)))


@node("DualCLIPLoader", category="advanced/loaders")
def load_text_encoders(
    clip_name1: Annotated[str, ModelFile("text_encoders")],
    clip_name2: Annotated[str, ModelFile("text_encoders")],
    type: Annotated[str, Choice(("flux",))],
    device: Annotated[str, Choice(("default", "cpu")), Optional()] = "default",
    *,
    context: NodeContext,
) -> Clip:
    """Loads the two text encoders of FLUX from their files, in either order."""
    files = [_open(context, "text_encoders", name) for name in (clip_name1, clip_name2)]
    return ClipHandle(_either(files, "clip_l"), _either(files, "t5"), on_cpu=device == "cpu")


@node("CLIPLoader", category="advanced/loaders", display_name="Load CLIP")
def load_text_encoders_of_one_file(
    clip_name: Annotated[str, ModelFile("text_encoders")],
    type: Annotated[str, Choice(("sd3",))],
    device: Annotated[str, Choice(("default", "cpu")), Optional()] = "default",
    *,
    context: NodeContext,
) -> Clip:
    """Loads both text encoders of FLUX from one file (they are of the kinds that SD3 has too)."""
    file = _open(context, "text_encoders", clip_name)
    missing = {"clip_l", "t5"} - set(file.components())
    if len(missing) == 1:
        raise UsoflowError(
            "model_kind",
            f"{clip_name} holds only {file.describe()}.",
            remedy="FLUX needs two text encoders: load them with DualCLIPLoader.",
        )
    return ClipHandle(file.component("clip_l"), file.component("t5"), on_cpu=device == "cpu")


@node("VAELoader", category="loaders", display_name="Load VAE")
def load_vae(vae_name: Annotated[str, ModelFile("vae")], *, context: NodeContext) -> Vae:
    """Loads a VAE by itself."""
    return VaeHandle(_open(context, "vae", vae_name).component("vae"))


@node("CLIPVisionLoader", category="loaders", display_name="Load CLIP Vision")
def load_clip_vision(
    clip_name: Annotated[str, ModelFile("clip_vision")], *, context: NodeContext
) -> ClipVision:
    """Loads the SigLIP tower that sees style references."""
    return ClipVisionHandle(_open(context, "clip_vision", clip_name).component("siglip"))


@node("ModelPatchLoader", category="advanced/loaders", experimental=True)
def load_model_patch(name: Annotated[str, ModelFile("model_patches")], *, context: NodeContext) -> ModelPatch:
    """Loads the USO style projector."""
    return ModelPatchHandle(_open(context, "model_patches", name).component("uso_projector"))


@node("LoraLoaderModelOnly", category="loaders")
def load_lora_model_only(
    model: Model,
    lora_name: Annotated[str, ModelFile("loras")],
    strength_model: Annotated[float, _STRENGTH] = 1.0,
    *,
    context: NodeContext,
) -> Model:
    """Adds a LoRA to the transformer. Several can follow each other."""
    lora = _lora(context, lora_name)
    return replace(model, loras=(*model.loras, LoraUse(lora, strength_model)))


@node("LoraLoader", category="loaders", display_name="Load LoRA")
def load_lora(
    model: Model,
    clip: Clip,
    lora_name: Annotated[str, ModelFile("loras")],
    strength_model: Annotated[float, _STRENGTH, Tip("For the transformer; may be negative.")] = 1.0,
    strength_clip: Annotated[float, _STRENGTH, Tip("For the text encoders; may be negative.")] = 1.0,
    *,
    context: NodeContext,
) -> tuple[Model, Clip]:
    """Adds a LoRA to transformer and text encoders. Several can follow each other."""
    lora = _lora(context, lora_name)
    with_model = replace(model, loras=(*model.loras, LoraUse(lora, strength_model)))
    return with_model, replace(clip, loras=(*clip.loras, LoraUse(lora, strength_clip)))


def _transformer(file: TensorFile) -> Component:
    """The transformer; one that cannot be run (FLUX.1's tools) is refused here, not after all encoding."""
    component = file.component("flux")
    FluxConfig.from_component(component)
    return component


def _lora(context: NodeContext, name: str) -> Component:
    """A LoRA of either kind: USO's own layout, or those of other trainers."""
    file = _open(context, "loras", name)
    lora = file.component("uso_lora" if "uso_lora" in file.components() else "lora")
    refuse_other_methods(lora)
    return lora


def _open(context: NodeContext, folder: str, name: str) -> TensorFile:
    try:
        path = context.folders.model(folder, name)
    except UsoflowError as error:
        remedy = missing_file_remedy(folder, name, context.folders)
        raise UsoflowError(error.code, error.detail, remedy=remedy) from None
    return TensorFile.open(path)


def _either(files: list[TensorFile], kind: str) -> Component:
    """The component of this kind from the file that has it; if none has, the error of the first."""
    holder = next((file for file in files if kind in file.components()), files[0])
    return holder.component(kind)

"""A USO prompt for the small models: whole runs in a fraction of a second (fixture `small_models`)."""

from __future__ import annotations

from typing import Any

Prompt = dict[str, Any]


def text_to_image() -> Prompt:
    """Text only."""
    return {
        "loader": _node("CheckpointLoaderSimple", ckpt_name="flux1-dev-fp8.safetensors"),
        "text": _node("CLIPTextEncode", text="a cat", clip=["loader", 1]),
        "zero": _node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": _node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sampler": _node(
            "KSampler",
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
            model=["loader", 0],
            positive=["text", 0],
            negative=["zero", 0],
            latent_image=["empty", 0],
        ),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
        "save": _node("SaveImage", filename_prefix="out", images=["decode", 0]),
    }


def subject() -> Prompt:
    """Text, the USO LoRA and a subject reference."""
    prompt = text_to_image() | {
        "lora": _node(
            "LoraLoaderModelOnly",
            lora_name="uso-flux1-dit-lora-v1.safetensors",
            strength_model=1.0,
            model=["loader", 0],
        ),
        "picture": _node("LoadImage", image="subject.png"),
        "encode": _node("VAEEncode", pixels=["picture", 0], vae=["loader", 2]),
        "reference": _node("ReferenceLatent", conditioning=["text", 0], latent=["encode", 0]),
        "method": _node(
            "FluxKontextMultiReferenceLatentMethod",
            conditioning=["reference", 0],
            reference_latents_method="uxo/uno",
        ),
        "guidance": _node("FluxGuidance", conditioning=["method", 0], guidance=3.5),
    }
    prompt["sampler"]["inputs"] |= {"model": ["lora", 0], "positive": ["guidance", 0]}
    return prompt


def with_style(prompt: Prompt) -> Prompt:
    """The same with a style reference between the sampler and its model."""
    before = prompt["sampler"]["inputs"]["model"]
    prompt = prompt | {
        "tower": _node("CLIPVisionLoader", clip_name="sigclip_vision_patch14_384.safetensors"),
        "patch": _node("ModelPatchLoader", name="uso-flux1-projector-v1.safetensors"),
        "style picture": _node("LoadImage", image="style.png"),
        "vision": _node(
            "CLIPVisionEncode", clip_vision=["tower", 0], image=["style picture", 0], crop="center"
        ),
        "style": _node(
            "USOStyleReference", model=before, model_patch=["patch", 0], clip_vision_output=["vision", 0]
        ),
    }
    return with_inputs(prompt, "sampler", model=["style", 0])


def with_inputs(prompt: Prompt, node: str, **inputs: Any) -> Prompt:
    """A copy with other inputs of one node."""
    old = prompt[node]
    return {**prompt, node: {**old, "inputs": {**old["inputs"], **inputs}}}


def without(prompt: Prompt, node: str, name: str) -> Prompt:
    """A copy in which a node lacks an input."""
    old = prompt[node]
    return {**prompt, node: {**old, "inputs": {k: v for k, v in old["inputs"].items() if k != name}}}


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}

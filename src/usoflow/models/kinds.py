"""The kinds of model that a file may hold: by which tensors each is recognised, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

# A component is recognised by one tensor that every file of its kind has; what precedes it is the prefix.
SIGNATURES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "flux": re.compile(r"^(.*?)double_blocks\.\d+\.img_attn\.qkv\.weight$"),
        "clip_l": re.compile(r"^(.*?)text_model\.embeddings\.token_embedding\.weight$"),
        "t5": re.compile(r"^(.*?)encoder\.block\.\d+\.layer\.0\.SelfAttention\.q\.weight$"),
        "vae": re.compile(r"^(.*?)decoder\.conv_in\.weight$"),
        "siglip": re.compile(r"^(.*?vision_model\.)embeddings\.patch_embedding\.weight$"),
        "uso_projector": re.compile(r"^(.*?)feature_embedder\.low_projection\.weight$"),
        # XLabs' LoRAs have the same names, many in the double blocks alone: these are but LoRAs.
        "uso_lora": re.compile(r"^(.*?)single_blocks\.\d+\.processor\.\w+_lora\d?\.up\.weight$"),
        "lora": re.compile(
            r"^().+\.(?:(?:lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight|processor\.\w+_lora\d?\.up\.weight"
            r"|hada_w1_a|lokr_w[12](?:_a)?|oft_\w+)$"
        ),  # LoHa, LoKr and OFT too: they are not applied, but told from other files
    }
)

# Tensors, without the prefix, that only a model of another family has beside those; and what that one is.
OTHER_FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "vae": ("quant_conv.weight", "a VAE of another family (of Stable Diffusion)"),
        "t5": ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "umT5"),
        "siglip": ("embeddings.class_embedding", "CLIP's vision tower"),
        "clip_l": ("text_model.head.weight", "SigLIP's text encoder"),
    }
)

KIND_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "flux": "FLUX.1 transformer",
        "clip_l": "CLIP-L text encoder",
        "t5": "T5 text encoder",
        "vae": "FLUX VAE",
        "siglip": "SigLIP vision tower",
        "uso_projector": "USO style projector",
        "uso_lora": "USO DiT LoRA",
        "lora": "LoRA",
    }
)

# A part of a folder that diffusers' `from_pretrained` reads: the transformer (or a part of it), or the VAE.
OF_DIFFUSERS = re.compile(
    r"^(single_)?transformer_blocks\.\d+\.(attn|norm)|^decoder\.up_blocks\.\d+\.resnets\."
)
SINGLE_FILES = (
    "usoflow reads single files, as ComfyUI does: instead of diffusers' folders transformer and vae,"
    " flux1-dev.safetensors and ae.safetensors of the same repository."
)

# Tensors of no model in an all-in-one file: the training temperatures of CLIP and SigLIP, and ComfyUI's "this
# file is scaled fp8" marker.
IGNORED_ANYWHERE = ("*logit_scale", "*logit_bias", "*scaled_fp8")

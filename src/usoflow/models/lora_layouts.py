"""The layouts of LoRA files: which layers, and which of their rows, each low-rank pair belongs to.

Reads names and shapes only (no torch), so that `usoflow models check` can tell whether a file fits. Known:

- ByteDance's USO (bytedance/USO): attention processors with `qkv_lora` and `proj_lora`;
- kohya-ss/sd-scripts: `lora_unet_` and the layer's name with underscores, `lora_down`, `lora_up`, `alpha`;
- PEFT, with the names of Black Forest Labs (`diffusion_model.`) or of diffusers (`transformer.`), whose
  separate q, k and v are rows of one layer here.

DoRA, LoHa, LoKr and OFT change weights by other rules than a low-rank sum: they are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import Component

Shapes = Mapping[str, tuple[int, ...]]  # of the weights of a network's linear layers: [out, in]
Rows = tuple[tuple[int, int], ...]  # of a layer: the first and how many, part by part

_SIDE = re.compile(
    r"^(?P<stem>.+?)\."
    r"(?:(?P<down>lora_down|lora_A|lora\.down|down)|(?P<up>lora_up|lora_B|lora\.up|up))"
    r"(?:\.\w+)?\.weight$"
)
_ALPHA: Final = ".alpha"
_METHODS: Final = (  # endings of tensor names in LyCORIS' and PEFT's files
    ("DoRA", re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)*)$")),
    ("LoHa", re.compile(r"\.hada_\w+$")),
    ("LoKr", re.compile(r"\.lokr_\w+$")),
    ("OFT", re.compile(r"\.oft_\w+(?:\.weight)?$")),
    ("LoCon with a Tucker core", re.compile(r"\.lora_mid\.weight$")),
)
PEFT_METADATA: Final = "lora_adapter_metadata"
# diffusers' names of the networks in it
_DECLARED: Mapping[str, str] = MappingProxyType(
    {"flux": "transformer.", "clip_l": "text_encoder.", "t5": "text_encoder_2."}
)

# Which network a pair is for: its names begin so.
_PREFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "clip_l": ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer."),
        "t5": ("lora_te3_", "lora_te2_", "text_encoder_2.", "text_encoders.t5xxl.transformer."),
        "flux": (
            "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.", "model.diffusion_model.",
            "diffusion_model.", "transformer.",
        ),
    }
)  # fmt: skip

# Of a file with the same pairs by several names, these are taken.
_PREFERRED: Final = ("transformer.", "lora_transformer_", "text_encoder.", "text_encoder_2.")

# Parts of a layer's rows, by how many times the layer's width of input they begin at; see `_rows`.
_DOUBLE: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "img_attn.qkv": (
            ("attn.to_q", "q"), ("attn.to_k", "k"), ("attn.to_v", "v"), ("processor.qkv_lora1", "all"),
        ),
        "txt_attn.qkv": (
            ("attn.add_q_proj", "q"), ("attn.add_k_proj", "k"), ("attn.add_v_proj", "v"),
            ("processor.qkv_lora2", "all"),
        ),
        "img_attn.proj": (("attn.to_out.0", "all"), ("processor.proj_lora1", "all")),
        "txt_attn.proj": (("attn.to_add_out", "all"), ("processor.proj_lora2", "all")),
        "img_mlp.0": (("ff.net.0.proj", "all"),),
        "img_mlp.2": (("ff.net.2", "all"),),
        "txt_mlp.0": (("ff_context.net.0.proj", "all"),),
        "txt_mlp.2": (("ff_context.net.2", "all"),),
        "img_mod.lin": (("norm1.linear", "all"),),
        "txt_mod.lin": (("norm1_context.linear", "all"),),
    }
)  # fmt: skip
_SINGLE: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "linear1": (
            ("attn.to_q", "q"), ("attn.to_k", "k"), ("attn.to_v", "v"), ("proj_mlp", "mlp"),
            ("processor.qkv_lora", "qkv"),
        ),
        "linear2": (("proj_out", "all"), ("processor.proj_lora", "all")),
        "modulation.lin": (("norm.linear", "all"),),
    }
)  # fmt: skip
_OUTSIDE: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "img_in": (("x_embedder", "all"),),
        "txt_in": (("context_embedder", "all"),),
        "time_in.in_layer": (("time_text_embed.timestep_embedder.linear_1", "all"),),
        "time_in.out_layer": (("time_text_embed.timestep_embedder.linear_2", "all"),),
        "guidance_in.in_layer": (("time_text_embed.guidance_embedder.linear_1", "all"),),
        "guidance_in.out_layer": (("time_text_embed.guidance_embedder.linear_2", "all"),),
        "vector_in.in_layer": (("time_text_embed.text_embedder.linear_1", "all"),),
        "vector_in.out_layer": (("time_text_embed.text_embedder.linear_2", "all"),),
        "final_layer.linear": (("proj_out", "all"),),
        "final_layer.adaLN_modulation.1": (("norm_out.linear", "swapped"),),  # diffusers: scale, then shift
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A LoRA file and its strength."""

    lora: Component
    strength: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One low-rank pair.

    Attributes:
        stem: its name in the file.
        down: name of the tensor [rank, in].
        up: name of the tensor [rows, rank].
        alpha: name of the scalar by which, divided by the rank, it is scaled; None where there is none.
        layer: the linear layer that it changes.
        rows: first row and number of rows in the layer, in the order of the rows of `up`.
    """

    stem: str
    down: str
    up: str
    alpha: str | None
    layer: str
    rows: Rows


@dataclass(frozen=True, slots=True)
class PeftScales:
    """What the metadata of a PEFT file declares of its pairs' strengths (peft's `LoraConfig`).

    Attributes:
        alpha: of all pairs without one of their own; None where none is declared.
        patterns: alphas of the layers whose names end so, as regular expressions.
        rooted: divided by the root of the rank ("rsLoRA", arXiv 2312.03732) and not by the rank.
    """

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    rooted: bool = False

    @classmethod
    def of(cls, lora: Component, role: str) -> Self:
        """Of the pairs for one network: "flux", "clip_l" or "t5".

        Raises:
            UsoflowError: `model_damaged`.
        """
        text = lora.file.metadata.get(PEFT_METADATA)
        if text is None:
            return cls()
        try:
            prefix = _DECLARED[role]
            declared = {
                name.removeprefix(prefix): value
                for name, value in json.loads(text).items()
                if name.startswith(prefix)
            }
            alpha = declared.get("lora_alpha")
            patterns = tuple(
                (re.compile(rf"(?:.*\.)?(?:{ending})"), float(value))
                for ending, value in (declared.get("alpha_pattern") or {}).items()
            )
            rooted = bool(declared.get("use_rslora"))
            return cls(None if alpha is None else float(alpha), patterns, rooted)
        except (ValueError, TypeError, AttributeError, re.error):
            raise UsoflowError(
                "model_damaged", f"{lora.file.path.name}: its {PEFT_METADATA} cannot be read."
            ) from None

    def of_pair(self, stem: str, rank: int) -> float:
        """The factor of a pair; 1 where nothing is declared."""
        alpha = next((value for ending, value in self.patterns if ending.fullmatch(stem)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rooted else rank)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a file for one network.

    Attributes:
        fitting: those with a layer.
        absent: names of those without.
        repeated: names of those that say by other names what fitting ones say.
        strange: tensors of the file that are no half of a pair: of another network or method.
    """

    fitting: tuple[Pair, ...]
    absent: tuple[str, ...]
    repeated: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many pairs the file has for the network."""
        return len(self.fitting) + len(self.absent)


def pairs_for(lora: Component, role: str, layers: Shapes) -> Pairs:
    """Match a LoRA file with a network.

    Args:
        lora: a component of kind `uso_lora` or `lora`.
        role: which network: "flux", "clip_l" or "t5".
        layers: shapes of its linear layers' weights, by name.

    Raises:
        UsoflowError: `model_unsupported` for other methods than LoRA, `lora_mismatch` for wrong shapes,
            `tensor_missing` for half a pair.
    """
    refuse_other_methods(lora)
    known = places(layers)
    fitting, absent = [], []
    stems, strange = _stems(lora)
    for stem, (down, up) in stems.items():
        if _role(stem) != role:
            continue
        found = known.get(_bare(stem, role))
        if found is None:
            absent.append(stem)
            continue
        layer, rows = found
        pair = Pair(stem, down, up, _alpha(lora, stem), layer, rows)
        _check(lora, pair, layers[layer])
        fitting.append(pair)
    once = _once(fitting, role)
    repeated = tuple(pair.stem for pair in fitting if pair not in once)
    return Pairs(tuple(pair for pair in fitting if pair in once), tuple(absent), repeated, strange)


def _once(pairs: list[Pair], role: str) -> set[Pair]:
    """Without those that change rows which pairs of another family of names change, too.

    Some files hold the same LoRA by the names of two trainers, and would be applied twice. Which names win
    is as in diffusers (`lora_conversion_utils`): its own, then kohya's of these.
    """
    families = {pair.stem: _prefix(pair.stem, role) for pair in pairs}
    ranked = sorted(set(families.values()), key=lambda prefix: (_rank(prefix), prefix))
    kept: set[Pair] = set()
    for family in ranked:
        taken: dict[str, list[tuple[int, int]]] = {}
        for pair in kept:
            taken.setdefault(pair.layer, []).extend(_spans(pair))
        own = (pair for pair in pairs if families[pair.stem] == family)
        kept |= {pair for pair in own if not _overlaps(pair, taken.get(pair.layer, ()))}
    return kept


def _rank(prefix: str) -> int:
    return _PREFERRED.index(prefix) if prefix in _PREFERRED else len(_PREFERRED)


def _spans(pair: Pair) -> Iterator[tuple[int, int]]:
    return ((first, first + count) for first, count in pair.rows)


def _overlaps(pair: Pair, taken: Collection[tuple[int, int]]) -> bool:
    return any(first < end and start < last for first, last in taken for start, end in _spans(pair))


def places(layers: Shapes) -> dict[str, tuple[str, Rows]]:
    """The layer and its rows of every name that a pair may have, less what tells the network."""
    return {name: (layer, _rows(part, layers[layer])) for name, (layer, part) in _aliases(layers)}


def refuse_other_methods(lora: Component) -> None:
    """LoRA files only.

    Raises:
        UsoflowError: `model_unsupported` for a file of another method, by name.
    """
    found = {name for name, ending in _METHODS if any(ending.search(tensor) for tensor in lora.tensors)}
    if found:
        raise UsoflowError(
            "model_unsupported",
            f"{lora.file.path.name} is a {' and '.join(sorted(found))} file: usoflow applies LoRA only.",
            remedy="Use a version of it that was trained or extracted as a LoRA.",
        )


def is_for_text(lora: Component) -> bool:
    """Whether the file has anything for a text encoder, by the names of its tensors."""
    return any(_role(name) != "flux" for name in lora.tensors)


def linear_layers(network: Component) -> Shapes:
    """Shapes of the matrices of a network by the name of their layer."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in network.shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def _stems(lora: Component) -> tuple[Mapping[str, tuple[str, str]], tuple[str, ...]]:
    """Names of the pairs with the names of their two tensors; and the tensors that are of no pair."""
    sides: dict[str, dict[str, str]] = {}
    strange = []
    for name in lora.tensors:
        match = _SIDE.match(name)
        if match:
            found, side = sides.setdefault(match["stem"], {}), "down" if match["down"] else "up"
            if side in found:
                raise UsoflowError(
                    "lora_mismatch",
                    f"{lora.file.path.name} holds several adapters: {found[side]} and {name}.",
                    remedy="Save each of them into a file of its own.",
                )
            found[side] = name
        elif not name.endswith(_ALPHA):
            strange.append(name)
    for found in sides.values():
        if len(found) == 1:
            (side, name) = next(iter(found.items()))
            other = "up" if side == "down" else "down"
            raise UsoflowError("tensor_missing", f"{lora.file.path.name} has {name} but no {other} to it.")
    return {stem: (found["down"], found["up"]) for stem, found in sides.items()}, tuple(strange)


def _role(stem: str) -> str:
    return next((role for role, prefixes in _PREFIXES.items() if stem.startswith(prefixes)), "flux")


def _bare(stem: str, role: str) -> str:
    """Without what precedes the layer's name; PEFT's own prefix may precede another."""
    for _ in range(2):
        stem = stem.removeprefix(_prefix(stem, role))
    return stem


def _prefix(stem: str, role: str) -> str:
    return next((prefix for prefix in _PREFIXES[role] if stem.startswith(prefix)), "")


def _alpha(lora: Component, stem: str) -> str | None:
    return stem + _ALPHA if stem + _ALPHA in lora.tensors else None


def _aliases(layers: Shapes) -> Iterator[tuple[str, tuple[str, str]]]:
    """Every name that a file may have for (layer, part of its rows), with points and with underscores."""
    for layer in layers:
        for name, part in ((layer, "all"), *_other_names(layer)):
            yield name, (layer, part)
            yield name.replace(".", "_"), (layer, part)


def _other_names(layer: str) -> Iterator[tuple[str, str]]:
    blocks, _, rest = layer.partition(".")
    number, _, inner = rest.partition(".")
    if blocks == "double_blocks":
        diffusers, table = "transformer_blocks", _DOUBLE
    elif blocks == "single_blocks":
        diffusers, table = "single_transformer_blocks", _SINGLE
    else:
        yield from _OUTSIDE.get(layer, ())
        return
    for name, part in table.get(inner, ()):
        own = blocks if name.startswith("processor.") else diffusers
        yield f"{own}.{number}.{name}", part


def _rows(part: str, shape: tuple[int, ...]) -> Rows:
    """First row and number of rows of a part; q, k and v are as wide as the layer's input."""
    rows, width = shape
    return {
        "all": ((0, rows),),
        "q": ((0, width),),
        "k": ((width, width),),
        "v": ((2 * width, width),),
        "qkv": ((0, 3 * width),),
        "mlp": ((3 * width, rows - 3 * width),),
        "swapped": ((rows // 2, rows // 2), (0, rows // 2)),
    }[part]


def _check(lora: Component, pair: Pair, layer: tuple[int, ...]) -> None:
    down, up = lora.tensors[pair.down].shape, lora.tensors[pair.up].shape
    rows = sum(count for _, count in pair.rows)
    if len(down) != 2 or not down[0] or down[1] != layer[1] or up != (rows, down[0]):
        raise UsoflowError(
            "lora_mismatch",
            f"{lora.file.path.name}: {pair.stem} is {list(up)} x {list(down)}, the layer {[rows, layer[1]]}.",
        )
    if pair.alpha and math.prod(lora.tensors[pair.alpha].shape) != 1:
        raise UsoflowError("lora_mismatch", f"{lora.file.path.name}: {pair.alpha} is not one number.")

"""CLIP-L and T5 against transformers at a small size, and against the reference's goldens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig as OracleClipConfig
from transformers import CLIPTextModel, T5EncoderModel
from transformers import T5Config as OracleT5Config

from golden.compare import Golden
from networks import relative
from usoflow.errors import UsoflowError
from usoflow.models import clip as clip_module
from usoflow.models import t5 as t5_module
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.clip import ClipText, ClipTextConfig
from usoflow.models.loading import tokenizers_of
from usoflow.models.placement import widen_fp8
from usoflow.models.t5 import T5Config, T5Encoder, relative_buckets
from usoflow.models.text import encode_prompt
from usoflow.models.tokens import CLIP_END, Tokenizers
from usoflow.models.weights import build

EPS = 1e-3  # large enough to be seen in the results
CLIP = ClipTextConfig(dim=32, mlp_dim=48, layers=3, positions=77, heads=4, eps=EPS)
T5 = T5Config(dim=24, inner_dim=32, mlp_dim=40, layers=3, heads=4, eps=EPS, min_length=64)

PROMPTS = (
    "",
    'A European girl with a heartfelt smile and holds a sign writes "USO x ComfyUI". She is immersed in a '
    "vast, endless field of blooming flowers under a perfect summer sky.",
    r"(a cat:1.3) [x] escaped \( \)",
    "a very long prompt about a castle on a hill, " * 12,
    "un café à la française — 日本語の猫 🐱 ñ",
)


def randomised(model: nn.Module) -> nn.Module:
    """Weights as large as trained ones are, norms and biases not at their neutral values."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 25
        table = "embed" in name or "shared" in name or "relative" in name
        neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = neutral + noise * (1.0 if table else fan_in**-0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip_oracle() -> CLIPTextModel:
    config = OracleClipConfig(
        vocab_size=CLIP.vocabulary,
        hidden_size=CLIP.dim,
        intermediate_size=CLIP.mlp_dim,
        num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads,
        max_position_embeddings=CLIP.positions,
        layer_norm_eps=EPS,
        hidden_act="quick_gelu",
        eos_token_id=CLIP_END,
    )
    return randomised(CLIPTextModel(config))


@pytest.fixture(scope="module")
def t5_oracle() -> T5EncoderModel:
    config = OracleT5Config(
        vocab_size=T5.vocabulary,
        d_model=T5.dim,
        d_kv=T5.inner_dim // T5.heads,
        d_ff=T5.mlp_dim,
        num_layers=T5.layers,
        num_heads=T5.heads,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=EPS,
        dropout_rate=0.0,
    )
    return randomised(T5EncoderModel(config))


def clip_state(oracle: CLIPTextModel) -> dict[str, Tensor]:
    """The oracle's weights under the names of the published file."""
    prefix = "text_model."
    return {prefix + n.removeprefix(prefix): t.clone().contiguous() for n, t in oracle.state_dict().items()}


def t5_state(oracle: T5EncoderModel) -> dict[str, Tensor]:
    names = dict(oracle.named_parameters())
    return {name: tensor.clone() for name, tensor in names.items()}


def component_of(path: Path, kind: str, state: dict[str, Tensor], **declared: object) -> Component:
    save_file(state, path, metadata={"usoflow.config": json.dumps({kind: declared})})
    return TensorFile.open(path).component(kind)


def load_clip(component: Component) -> ClipText:
    make = lambda: ClipText(ClipTextConfig.from_component(component))  # noqa: E731
    return build(component, make, ignored=clip_module.IGNORED)


def load_t5(component: Component) -> T5Encoder:
    make = lambda: T5Encoder(T5Config.from_component(component))  # noqa: E731
    return build(component, make, ignored=t5_module.IGNORED)


@pytest.fixture
def clip_component(clip_oracle: CLIPTextModel, tmp_path: Path) -> Component:
    state = clip_state(clip_oracle)
    return component_of(tmp_path / "clip_l.safetensors", "clip_l", state, heads=CLIP.heads, eps=EPS)


@pytest.fixture
def t5_component(t5_oracle: T5EncoderModel, tmp_path: Path) -> Component:
    state = t5_state(t5_oracle)
    return component_of(tmp_path / "t5.safetensors", "t5", state, min_length=T5.min_length, eps=EPS)


def ids(*shape: int, rows: int) -> Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(0))


# --- the networks -------------------------------------------------------------------------------------


def test_configurations_follow_from_shapes_and_declarations(
    clip_component: Component, t5_component: Component
) -> None:
    assert ClipTextConfig.from_component(clip_component) == CLIP
    assert T5Config.from_component(t5_component) == T5


@pytest.mark.parametrize("length", [1, 30, 77])
def test_clip_equals_transformers(clip_oracle: CLIPTextModel, clip_component: Component, length: int) -> None:
    tokens = ids(2, length, rows=CLIP_END)
    ends = torch.tensor([length // 2, length - 1])
    tokens[torch.arange(2), ends] = CLIP_END
    expected = clip_oracle(tokens)
    clip = load_clip(clip_component)
    assert relative(clip.text_model(tokens), expected.last_hidden_state) < 1e-5
    assert relative(clip(tokens, ends), expected.pooler_output) < 1e-5


@pytest.mark.parametrize("length", [1, 20, 300])  # 300: past the last bucket
def test_t5_equals_transformers(t5_oracle: T5EncoderModel, t5_component: Component, length: int) -> None:
    tokens = ids(2, length, rows=T5.vocabulary)
    expected = t5_oracle(tokens).last_hidden_state
    assert relative(load_t5(t5_component)(tokens), expected) < 1e-5


def test_a_long_prompt_is_attended_to_in_parts(
    t5_oracle: T5EncoderModel, t5_component: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which none has all scores; a last part that is shorter, too."""
    tokens, t5 = ids(2, 50, rows=T5.vocabulary), load_t5(t5_component)
    whole, asked = t5(tokens), []
    attention = F.scaled_dot_product_attention

    def listened(q: Tensor, *rest: Tensor, **more: Any) -> Tensor:
        asked.append((q.shape[2], more["attn_mask"].shape))
        return attention(q, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", listened)
    monkeypatch.setattr(t5_module, "SCORES", 2 * T5.heads * 50 * 12)
    parts = t5(tokens)
    assert asked == T5.layers * [(n, (1, T5.heads, n, 50)) for n in (12, 12, 12, 12, 2)]
    assert relative(parts, whole) < 1e-6
    assert relative(parts, t5_oracle(tokens).last_hidden_state) < 1e-5


def test_buckets_are_half_exact_and_half_logarithmic() -> None:
    distance = torch.tensor([0, -1, -7, -8, -11, -12, -127, -128, -5000, 1, 7, 8, 128])
    assert relative_buckets(distance, 32).tolist() == [0, 1, 7, 8, 8, 9, 15, 15, 15, 17, 23, 24, 31]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_t5_widens_stored_weights_exactly(
    t5_oracle: T5EncoderModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in t5_state(t5_oracle).items()}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    stored = load_t5(component_of(tmp_path / "narrow.safetensors", "t5", narrow))
    tokens = ids(1, 20, rows=T5.vocabulary)
    expected = load_t5(component_of(tmp_path / "wide.safetensors", "t5", wide))(tokens)
    assert stored.shared.weight.dtype == dtype
    assert stored(tokens).dtype == torch.float32
    assert torch.equal(stored(tokens), expected)


def test_nans_of_a_table_rounded_to_fp8_are_read_as_zero(
    t5_oracle: T5EncoderModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What fp8 does not have became NaN; as the reference, but a warning says so."""
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in t5_state(t5_oracle).items()}
    state["shared.weight"].view(torch.uint8)[7, 3] = 0x7F
    zeroed = {name: tensor.clone() for name, tensor in state.items()}
    zeroed["shared.weight"].view(torch.uint8)[7, 3] = 0
    found, wanted = (
        load_t5(component_of(tmp_path / f"{n}.safetensors", "t5", tensors))
        for n, tensors in enumerate((state, zeroed))
    )
    assert torch.equal(found(torch.tensor([[1, 2, 3]])), wanted(torch.tensor([[1, 2, 3]])))
    assert not caplog.records
    assert torch.equal(found(torch.tensor([[1, 7, 3]])), wanted(torch.tensor([[1, 7, 3]])))
    assert "read as 0" in caplog.text
    widen_fp8(found)  # as on Apple's GPUs
    assert torch.equal(found(torch.tensor([[1, 7, 3]])), wanted(torch.tensor([[1, 7, 3]])))


# --- prompts ------------------------------------------------------------------------------------------


@pytest.fixture
def encoders(clip_component: Component, t5_component: Component) -> tuple[ClipText, T5Encoder, Tokenizers]:
    clip, t5 = load_clip(clip_component), load_t5(t5_component)
    return clip, t5, tokenizers_of(clip, t5)


Encoders = tuple[ClipText, T5Encoder, Tokenizers]


def test_prompt_equals_transformers_on_padded_ids(
    encoders: Encoders, clip_oracle: CLIPTextModel, t5_oracle: T5EncoderModel
) -> None:
    tokenizers = encoders[2]
    text = "a <|endoftext|> photo, " * 40  # two chunks; the first end token is not the last
    encoding = encode_prompt(text, *encoders)
    chunk = torch.tensor([tokenizers.clip(text)[0].ids])
    assert relative(encoding.pooled, clip_oracle(chunk).pooler_output) < 1e-5
    tokens = torch.tensor([tokenizers.t5(text).ids])
    assert encoding.context.shape == (1, tokens.shape[1], T5.dim)
    assert relative(encoding.context, t5_oracle(tokens).last_hidden_state) < 1e-5


def test_short_prompts_are_padded_to_the_declared_length(encoders: Encoders) -> None:
    assert encode_prompt("a", *encoders).context.shape == (1, T5.min_length, T5.dim)


def test_weights_move_tokens_away_from_the_empty_prompt(encoders: Encoders) -> None:
    plain = encode_prompt("red cat", *encoders)
    empty = encode_prompt("", *encoders)
    weighted = encode_prompt("(red:1.5) cat", *encoders)
    factor = torch.ones(1, T5.min_length, 1)
    factor[:, :1] = 1.5  # one token
    expected = empty.context + factor * (plain.context - empty.context)
    assert relative(weighted.context, expected) < 1e-5
    assert relative(weighted.context, plain.context) > 1e-2
    assert torch.equal(weighted.pooled, plain.pooled), "the pooled vector is not weighted"


def test_the_empty_prompt_is_encoded_only_for_weights(
    encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    forward = T5Encoder.forward

    def counting(self: T5Encoder, tokens: Tensor) -> Tensor:
        batches.append(len(tokens))
        return forward(self, tokens)

    monkeypatch.setattr(T5Encoder, "forward", counting)
    encode_prompt("(a:1.0) b", *encoders)
    encode_prompt("(a:1.1) b", *encoders)
    assert batches == [1, 2]


# --- what is refused ----------------------------------------------------------------------------------


def test_heads_must_be_declared_at_an_unknown_width(clip_oracle: CLIPTextModel, tmp_path: Path) -> None:
    component = component_of(tmp_path / "clip_l.safetensors", "clip_l", clip_state(clip_oracle))
    with pytest.raises(UsoflowError, match="width 32 with an unknown number of heads") as caught:
        ClipTextConfig.from_component(component)
    assert caught.value.code == "model_unsupported"


def test_a_table_without_all_tokens_is_refused(clip_oracle: CLIPTextModel, tmp_path: Path) -> None:
    state = clip_state(clip_oracle)
    name = "text_model.embeddings.token_embedding.weight"
    state[name] = state[name][:1000].clone()
    component = component_of(tmp_path / "clip_l.safetensors", "clip_l", state, heads=CLIP.heads)
    with pytest.raises(UsoflowError, match="1000 tokens instead of 49408"):
        ClipTextConfig.from_component(component)


@pytest.mark.parametrize(("encoder", "stage"), [(0, "CLIP-L"), (1, "T5")])
def test_non_finite_values_name_the_encoder(encoders: Encoders, encoder: int, stage: str) -> None:
    layer = encoders[0].text_model.final_layer_norm if encoder == 0 else encoders[1].encoder.final_layer_norm
    layer.weight.data = layer.weight.data * float("nan")
    with pytest.raises(UsoflowError, match=stage) as caught:
        encode_prompt("a", *encoders)
    assert caught.value.code == "non_finite"


# --- goldens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "prompts"), [pytest.param("bf16", range(5), marks=pytest.mark.full), ("fp8", [1])]
)
def test_goldens(synth_models: Path, golden: Callable[[str], Golden], file: str, prompts: list[int]) -> None:
    components = TensorFile.open(synth_models / f"checkpoints/flux1-dev-{file}.safetensors").components()
    clip, t5 = load_clip(components["clip_l"]), load_t5(components["t5"])
    tokenizers = tokenizers_of(clip, t5)
    for number in prompts:
        encoding = encode_prompt(PROMPTS[number], clip, t5, tokenizers)
        for name, result in (("cond", encoding.context), ("pooled", encoding.pooled)):
            report = golden("text").check(f"{file}.p{number}.{name}", result.numpy(), 1e-4)
            assert report["ok"], report
    tokens = torch.tensor([tokenizers.clip(PROMPTS[1])[0].ids])
    states = clip.text_model(tokens)
    report = golden("text").check(f"{file}.p1.clip_l_last", states.numpy(), 1e-4)
    assert report["ok"], report

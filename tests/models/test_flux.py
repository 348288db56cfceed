"""The transformer against diffusers' FluxTransformer2DModel at a small size, and against the goldens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.peer import twin as diffusers_twin
from torch import Tensor

from networks import relative
from usoflow.models.checkpoint import TensorFile
from usoflow.models.embeddings import patchify, rotary_table, timestep_embedding, unpatchify
from usoflow.models.flux import Flux
from usoflow.models.flux_config import FluxConfig
from usoflow.models.loading import load_flux, load_projector
from usoflow.models.references import position_ids

CONFIG = FluxConfig(
    hidden=64, text_dim=24, pooled_dim=20, mlp_dim=256, channels=16,
    double_blocks=2, single_blocks=3, guidance=True, head_dim=32, axes=(8, 12, 12),
)  # fmt: skip
RTOL = 1e-4


def small_flux(seed: int = 0, config: FluxConfig = CONFIG) -> Flux:
    generator = torch.Generator().manual_seed(seed)
    model = Flux(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.requires_grad_(False)


@pytest.mark.parametrize("method", ["uxo", "index"])
@pytest.mark.parametrize("references", [(), ((6, 4),), ((6, 4), (2, 8))])
def test_diffusers_agrees(method: str, references: tuple[tuple[int, int], ...]) -> None:
    """Same weights, tokens and position ids: same velocity; with references and style tokens too."""
    ours = small_flux()
    twin = diffusers_twin(ours)
    torch.manual_seed(1)
    latent, text, pooled = torch.randn(2, 16, 8, 10), torch.randn(2, 5, 24), torch.randn(2, 20)
    latents, style = [torch.randn(1, 16, h, w) for h, w in references], torch.randn(1, 3, 64)
    inputs = ours.prepare(
        text, pooled, (8, 10), batch=2, guidance=3.5, references=latents, method=method, style=style
    )
    ids = position_ids((8, 10), references, method)
    image = torch.cat([patchify(latent), *(patchify(r).expand(2, -1, -1) for r in latents)], dim=1)
    # diffusers embeds text itself: the style tokens are put before them after its context_embedder.
    twin.context_embedder.register_forward_hook(
        lambda _m, _i, out: torch.cat([style.expand(2, -1, -1), out], 1)
    )
    with torch.no_grad():
        theirs = twin(
            hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled,
            timestep=torch.full((2,), 0.7), guidance=torch.full((2,), 3.5),
            img_ids=ids, txt_ids=torch.zeros(8, 3), return_dict=False,
        )[0]  # fmt: skip
        found = ours(latent, torch.tensor(0.7), inputs)
    assert relative(found, unpatchify(theirs[:, : 4 * 5], latent.shape)) < RTOL


def test_odd_sizes_are_padded_by_wrapping_and_cropped_back() -> None:
    latent = torch.arange(2 * 3 * 5, dtype=torch.float32).reshape(1, 2, 3, 5)
    tokens = patchify(latent)
    assert tokens.shape == (1, 2 * 3, 2 * 4)
    assert torch.equal(unpatchify(tokens, latent.shape), latent)
    assert tokens[0, -1, 0] == latent[0, 0, 2, 4]
    assert tokens[0, -1, 3] == latent[0, 0, 0, 0]  # wrapped around in both directions


def test_patch_features_are_ordered_channel_row_column() -> None:
    latent = torch.arange(16.0).reshape(1, 4, 2, 2)
    assert torch.equal(patchify(latent)[0, 0], torch.arange(16.0))


def test_rotary_table_is_positions_times_frequencies() -> None:
    cos, sin = rotary_table(torch.tensor([[0.0, 0.0], [3.0, 5.0]]), (4, 2), 100)
    assert torch.equal(cos[0], torch.ones(3))
    angles = torch.tensor([3.0, 3.0 / 10, 5.0])  # theta^(-2i/d): 1, 1/10 for d = 4; 1 for d = 2
    assert torch.allclose(cos[1], angles.cos())
    assert torch.allclose(sin[1], angles.sin())


def test_timestep_embedding_begins_with_the_fastest_cosine() -> None:
    features = timestep_embedding(torch.tensor([0.25]))
    assert features.shape == (1, 256)
    assert torch.isclose(features[0, 0], torch.tensor(250.0).cos())
    assert torch.isclose(features[0, 128], torch.tensor(250.0).sin())


def test_a_batch_is_its_members() -> None:
    """Nothing mixes between the pictures of a batch."""
    model = small_flux()
    torch.manual_seed(2)
    latent, text, pooled, style = (
        torch.randn(3, 16, 4, 4), torch.randn(1, 5, 24), torch.randn(1, 20), torch.randn(1, 3, 64)
    )  # fmt: skip
    reference = [torch.randn(1, 16, 2, 4)]
    sigma = torch.tensor(0.4)
    together = model(
        latent, sigma, model.prepare(text, pooled, (4, 4), batch=3, references=reference, style=style)
    )
    alone = [
        model(one, sigma, model.prepare(text, pooled, (4, 4), references=reference, style=style))
        for one in latent.split(1)
    ]
    assert relative(together, torch.cat(alone)) < 1e-5


def test_style_tokens_may_come_from_elsewhere() -> None:
    """They are kept on the CPU; a device without values stands for a GPU."""
    with torch.device("meta"):
        model, text, pooled = small_flux(), torch.randn(1, 5, 24), torch.randn(1, 20)
    inputs = model.prepare(text, pooled, (4, 4), style=torch.randn(1, 3, 64), dtype=torch.bfloat16)
    assert (inputs.text.device.type, inputs.text.dtype) == ("meta", torch.bfloat16)
    assert inputs.text.shape == (1, 8, 64)


def test_fp16_holds_what_leaves_its_range() -> None:
    """The residual streams of FLUX.1 do; bf16 and fp32 have room for them."""
    model = small_flux()
    for block in model.double_blocks:
        block.txt_mlp["2"].bias.data.fill_(3e6)  # times a gate of about 0.1 and less
    for block in model.single_blocks:
        block.linear2.bias.data.fill_(3e6)
    torch.manual_seed(3)
    latent, text, pooled = torch.randn(1, 16, 4, 4), torch.randn(1, 5, 24), torch.randn(1, 20)
    found = model(latent, torch.tensor(0.4), model.prepare(text, pooled, (4, 4), dtype=torch.float16))
    assert bool(torch.isfinite(found).all())


def test_more_references_change_the_picture() -> None:
    model = small_flux()
    torch.manual_seed(3)
    latent, text, pooled = torch.randn(1, 16, 4, 4), torch.randn(1, 5, 24), torch.randn(1, 20)
    reference = torch.randn(1, 16, 4, 4)

    def velocity(count: int, method: str = "uxo") -> Tensor:
        inputs = model.prepare(text, pooled, (4, 4), references=[reference] * count, method=method)
        return model(latent, torch.tensor(0.4), inputs)

    for one, other in [(0, 1), (1, 2)]:
        assert relative(velocity(one), velocity(other)) > 1e-4
    assert relative(velocity(1), velocity(1, "index")) > 1e-5


@pytest.fixture(scope="module")
def full_flux(synth_models: Path) -> Flux:
    return load_flux(
        TensorFile.open(synth_models / "checkpoints/flux1-dev-bf16.safetensors").component("flux")
    )


def _golden_inputs(synthetic, synth_models: Path, name: str) -> tuple[Tensor, dict[str, object]]:
    """Latent and arguments of `prepare` for a case of goldens/dit.npz."""

    def reference(key: str, size: tuple[int, int]) -> Tensor:
        return (synthetic(key, (1, 16, *size), 2) - 0.1159) * 0.3611

    a, b = reference("ref.a", (8, 12)), reference("ref.b", (14, 6))
    latent = (
        synthetic("dit.x2", (1, 16, 10, 22)) if "nonsquare" in name else synthetic("dit.x", (1, 16, 16, 16))
    )
    arguments: dict[str, object] = {"size": tuple(latent.shape[-2:])}
    if name == "t2i.noguidance":
        arguments["guidance"] = None
    if name == "ref.uxo.1":
        arguments |= {"references": [a], "method": "uxo"}
    if name == "ref.offset.2":
        arguments |= {"references": [a, b], "method": "offset"}
    if name == "style.1":
        file = TensorFile.open(synth_models / "model_patches/uso-flux1-projector-v1.safetensors")
        states = {
            layer: synthetic(f"sig.a.{level}", (1, 729, 1152), 2)
            for level, layer in (("low", -20), ("mid", -11), ("high", -2))
        }
        arguments["style"] = load_projector(file.component("uso_projector"))(states)
    return latent, arguments


FULL = pytest.mark.full
CASES = [
    "ref.uxo.1",
    *(pytest.param(name, marks=FULL) for name in ("t2i", "t2i.t1.0", "t2i.noguidance", "t2i.nonsquare")),
    *(pytest.param(name, marks=FULL) for name in ("ref.offset.2", "style.1")),
]


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_golden(name: str, full_flux: Flux, synthetic, synth_models: Path, golden) -> None:
    latent, arguments = _golden_inputs(synthetic, synth_models, name)
    text, pooled = synthetic("dit.ctx", (1, 256, 4096), 0.2), synthetic("dit.y", (1, 768))
    velocity = full_flux(
        latent, torch.tensor(1.0 if name == "t2i.t1.0" else 0.7), full_flux.prepare(text, pooled, **arguments)
    )
    result = golden("dit").check(name, velocity.numpy(), RTOL)
    assert result["ok"], result


@pytest.mark.full
@torch.inference_mode()
def test_bf16_is_near_fp32(full_flux: Flux, synthetic, golden) -> None:
    """The default dtype's distance to fp32 for one velocity, docs/numerics.md."""
    latent = synthetic("dit.x", (1, 16, 16, 16))
    text, pooled = synthetic("dit.ctx", (1, 256, 4096), 0.2), synthetic("dit.y", (1, 768))
    velocity = full_flux(
        latent, torch.tensor(0.7), full_flux.prepare(text, pooled, (16, 16), dtype=torch.bfloat16)
    )
    result = golden("dit").check("t2i", velocity.numpy(), 0.01)
    assert result["ok"], result


def test_styles_of_a_batch_share_a_prompt() -> None:
    model = small_flux()
    torch.manual_seed(2)
    text, pooled, style = torch.randn(1, 5, 24), torch.randn(1, 20), torch.randn(2, 3, 64)
    together = model.prepare(text, pooled, (4, 4), batch=2, style=style)
    for number in range(2):
        alone = model.prepare(text, pooled, (4, 4), style=style[number : number + 1])
        assert torch.allclose(together.text[number], alone.text[0], atol=1e-6)


def test_a_large_batch() -> None:
    """Of more pictures than there are tokens at once."""
    model = small_flux()
    torch.manual_seed(2)
    latent, text, pooled = torch.randn(65, 16, 2, 2), torch.randn(1, 2, 24), torch.randn(1, 20)
    with torch.no_grad():
        found = model(latent, torch.tensor(0.4), model.prepare(text, pooled, (2, 2), batch=65))
        alone = model(latent[64:], torch.tensor(0.4), model.prepare(text, pooled, (2, 2)))
    assert torch.allclose(found[64:], alone, atol=1e-4)

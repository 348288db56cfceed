"""SigLIP against transformers at a small size, its preprocessing against Pillow, both against the goldens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipConfig as SiglipConfigOfBoth
from transformers import SiglipModel, SiglipVisionConfig, SiglipVisionModel

from golden import synth
from golden.compare import Golden
from networks import relative
from usoflow.errors import UsoflowError
from usoflow.models import vision
from usoflow.models.checkpoint import Component, TensorFile
from usoflow.models.inspection import inspect
from usoflow.models.vision import SiglipConfig, SiglipVision, preprocess
from usoflow.models.weights import build

CONFIG = SiglipConfig(dim=32, mlp_dim=40, layers=4, heads=4, patch=5, grid=3, image_size=17, eps=1e-3)
TEXT = {"hidden_size": CONFIG.dim, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def oracle() -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.mlp_dim,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        image_size=CONFIG.image_size,
        patch_size=CONFIG.patch,
        layer_norm_eps=CONFIG.eps,
        hidden_act="gelu_pytorch_tanh",
    )
    model = SiglipVisionModel(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = neutral + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def state_of(oracle: SiglipVisionModel) -> dict[str, Tensor]:
    """The oracle's weights, pooling head included, under the names of the published file."""
    prefix = "vision_model."
    return {prefix + n.removeprefix(prefix): t.clone().contiguous() for n, t in oracle.state_dict().items()}


def component_of(path: Path, state: dict[str, Tensor], **declared: object) -> Component:
    save_file(state, path, metadata={"usoflow.config": json.dumps({"siglip": declared})})
    return TensorFile.open(path).component("siglip")


def test_the_tower_of_a_whole_siglip(oracle: SiglipVisionModel, tmp_path: Path) -> None:
    """As Google publishes it, and bytedance/USO loads it: with a text encoder, which is nobody's here."""
    whole = SiglipModel(SiglipConfigOfBoth(text_config=TEXT, vision_config=oracle.config))
    state = {name: t.clone().contiguous() for name, t in whole.state_dict().items()} | state_of(oracle)
    component = component_of(tmp_path / "whole.safetensors", state, heads=CONFIG.heads, eps=CONFIG.eps)
    own = component_of(tmp_path / "own.safetensors", state_of(oracle), heads=CONFIG.heads, eps=CONFIG.eps)
    assert component.file.components() == {"siglip": component}
    assert component.file.describe() == "SigLIP vision tower, SigLIP's text encoder"
    assert "every value is finite" in "".join(inspect(tmp_path / "whole.safetensors", None))
    assert component.tensors.keys() == own.tensors.keys()
    save_file(state | {"strange.weight": torch.ones(1)}, tmp_path / "strange.safetensors")
    with pytest.raises(UsoflowError, match=r"belong to no model in it: strange\.weight"):
        TensorFile.open(tmp_path / "strange.safetensors").components()
    size = CONFIG.grid * CONFIG.patch
    picture = torch.rand(1, 3, size, size)
    ours, theirs = (load(part)(picture, layers=[-2]).hidden[-2] for part in (component, own))
    assert torch.equal(ours, theirs)


@pytest.fixture
def tower(oracle: SiglipVisionModel, tmp_path: Path) -> SiglipVision:
    path = tmp_path / "siglip.safetensors"
    declared = {"heads": CONFIG.heads, "image_size": CONFIG.image_size, "eps": CONFIG.eps}
    return load(component_of(path, state_of(oracle), **declared))


def load(component: Component) -> SiglipVision:
    make = lambda: SiglipVision(SiglipConfig.from_component(component))  # noqa: E731
    return build(component, make, ignored=vision.IGNORED)


def pixels(batch: int = 2) -> Tensor:
    size = CONFIG.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


# --- the tower ----------------------------------------------------------------------------------------


def test_configuration_follows_from_shapes_and_declaration(tower: SiglipVision) -> None:
    assert tower.config == CONFIG


def test_hidden_states_equal_transformers(oracle: SiglipVisionModel, tower: SiglipVision) -> None:
    expected = oracle(pixels(), output_hidden_states=True).hidden_states  # embeddings, then the layers
    hidden = tower(pixels(), layers=(-4, -2, -1)).hidden
    assert set(hidden) == {-4, -2, -1}
    for layer, states in hidden.items():
        assert states.shape == (2, CONFIG.grid**2, CONFIG.dim)
        assert relative(states, expected[layer]) < 1e-5


def test_computes_in_fp32_from_narrow_weights(oracle: SiglipVisionModel, tmp_path: Path) -> None:
    narrow = {name: tensor.half() for name, tensor in state_of(oracle).items()}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    declared = {"heads": CONFIG.heads, "image_size": CONFIG.image_size}
    results = [
        load(component_of(tmp_path / f"{n}.safetensors", state, **declared))(pixels(), layers=[-1]).hidden[-1]
        for n, state in enumerate((narrow, wide))
    ]
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


def test_layers_below_the_deepest_wanted_are_not_run(tower: SiglipVision) -> None:
    tower.encoder.layers[-1].mlp.fc1.weight.data.fill_(float("nan"))
    assert set(tower(pixels(), layers=[-2]).hidden) == {-2}


def test_non_finite_values_name_the_tower(tower: SiglipVision) -> None:
    tower.encoder.layers[-1].mlp.fc1.weight.data.fill_(float("nan"))
    with pytest.raises(UsoflowError, match="SigLIP") as caught:
        tower(pixels(), layers=[-1])
    assert caught.value.code == "non_finite"


@pytest.mark.parametrize("layer", [-5, 0, 4])
def test_layers_that_are_not_there_are_refused(tower: SiglipVision, layer: int) -> None:
    with pytest.raises(UsoflowError, match="4 layers") as caught:
        tower(pixels(), layers=[layer])
    assert caught.value.code == "model_unsupported"


def test_size_follows_from_the_positions_unless_declared(oracle: SiglipVisionModel, tmp_path: Path) -> None:
    component = component_of(tmp_path / "siglip.safetensors", state_of(oracle), heads=CONFIG.heads)
    assert SiglipConfig.from_component(component).image_size == CONFIG.grid * CONFIG.patch


def test_a_size_that_contradicts_the_positions_is_refused(oracle: SiglipVisionModel, tmp_path: Path) -> None:
    path = tmp_path / "siglip.safetensors"
    component = component_of(path, state_of(oracle), heads=CONFIG.heads, image_size=20)
    with pytest.raises(UsoflowError, match="20 pixels in patches of 5") as caught:
        SiglipConfig.from_component(component)
    assert caught.value.code == "model_unsupported"


# --- pictures -----------------------------------------------------------------------------------------


def picture(height: int, width: int, channels: int = 3) -> Tensor:
    """Smooth with some noise, [1, H, W, C]."""
    generator = torch.Generator().manual_seed(height)
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    smooth = (rows[:, None] * columns)[..., None].expand(height, width, channels)
    return (0.8 * smooth + 0.2 * torch.rand(height, width, channels, generator=generator))[None]


def pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's antialiased bicubic resize of a float picture, [H, W, C]."""
    planes = [Image.fromarray(plane.numpy()) for plane in image[0].movedim(-1, 0)]
    resized = [np.asarray(plane.resize(size[::-1], Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(resized, axis=-1))


@pytest.mark.parametrize(
    ("height", "width", "scaled", "corner"),
    [
        (100, 71, (68, 48), (10, 0)),  # 48 / 71 * 100 = 67.6
        (60, 125, (48, 100), (0, 26)),
        (30, 37, (48, 59), (0, 5)),  # enlarged; 59 - 48 = 11, half of it rounded down
    ],
)
def test_centre_crop(height: int, width: int, scaled: tuple[int, int], corner: tuple[int, int]) -> None:
    top, left = corner
    expected = pillow(picture(height, width), scaled)[top : top + 48, left : left + 48]
    found = (preprocess(picture(height, width), 48, "center")[0].movedim(0, -1) + 1) / 2
    assert found.shape == expected.shape
    assert float((found - expected.clamp(0, 1)).abs().max()) <= 0.51 / 255  # rounded to 8 bits


@pytest.mark.parametrize("size", [(4800, 6), (5, 3001), (48, 1001)])
def test_of_a_very_long_picture_only_the_middle_is_scaled(size: tuple[int, int]) -> None:
    """All of it would be scaled to 48 by 38400 pixels, or as much as that."""
    image, short = picture(*size), min(size)
    kept = [min(side, 40 * short + side % 2) for side in size]  # as much is cut off at either end
    cut = [slice((side - middle) // 2, (side + middle) // 2) for side, middle in zip(size, kept, strict=True)]
    found = preprocess(image, 48, "center")
    assert float((found - preprocess(image[:, cut[0], cut[1]], 48, "center")).abs().max()) <= 2 / 255 + 1e-6


def test_without_crop_the_picture_is_stretched() -> None:
    expected = pillow(picture(60, 100), (48, 48)).clamp(0, 1)
    found = (preprocess(picture(60, 100), 48, "none")[0].movedim(0, -1) + 1) / 2
    assert float((found - expected).abs().max()) <= 0.51 / 255


def test_values_are_rounded_to_8_bits_even_without_a_resize() -> None:
    image = torch.full((1, 48, 48, 3), 100.4 / 255)
    found = preprocess(image, 48)
    assert torch.allclose(found, torch.tensor(100 / 255 * 2 - 1), atol=1e-6)


def test_values_are_clamped_and_alpha_is_dropped() -> None:
    image = torch.cat([torch.full((1, 48, 48, 2), 1.5), torch.full((1, 48, 48, 2), -0.5)], dim=-1)
    found = preprocess(image, 48)
    assert found.shape == (1, 3, 48, 48)
    assert found[0, :, 0, 0].tolist() == [1.0, 1.0, -1.0]


# --- goldens ------------------------------------------------------------------------------------------


def drawn(name: str, height: int, width: int) -> Tensor:
    return torch.from_numpy(synth.image(name, height, width).astype(np.float32) / 255)[None]


@pytest.mark.parametrize(
    ("name", "size", "crop"),
    [("a", (430, 640), "center"), ("a", (430, 640), "none"), ("b", (384, 384), "center")],
)
def test_preprocessing_goldens(
    golden: Callable[[str], Golden], name: str, size: tuple[int, int], crop: str
) -> None:
    found = preprocess(drawn(f"vis.{name}", *size), 384, crop)
    report = golden("vision").check(f"pre.{name}.{crop}", found.numpy(), 1e-6)
    assert report["ok"], report


def test_goldens(synth_models: Path, golden: Callable[[str], Golden]) -> None:
    file = TensorFile.open(synth_models / "clip_vision/sigclip_vision_patch14_384.safetensors")
    tower = load(file.component("siglip"))
    assert tower.config.heads == 16
    name = "17-17-29.webp.webp"
    images = drawn(name, *synth.IMAGES[name])
    hidden = tower(preprocess(images, tower.config.image_size, "center"), layers=(-20, -11, -2, -1)).hidden
    for layer, states in hidden.items():
        report = golden("vision").check(f"17-17-29.center.hs{layer}", states.numpy(), 1e-4)
        assert report["ok"], report

"""The VAE against diffusers' AutoencoderKL at a small size, and against the reference's goldens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from golden import synth
from golden.compare import Golden
from networks import relative
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.latent_format import LatentFormat
from usoflow.models.loading import load_vae
from usoflow.models.vae import AutoEncoder, VaeConfig, _within_kernels, centre_crop
from usoflow.models.weights import build
from usoflow.settings import POCKET_MODELS

CONFIG = VaeConfig(widths=(8, 16, 24), blocks=1, latent_channels=4, groups=4, eps=1e-5)
DECLARED = {"vae": {"groups": 4, "eps": 1e-5, "scale": 0.5, "shift": -0.25}}

RENAMES = (
    (r"^(encoder|decoder)\.mid_block\.resnets\.(\d)", lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", lambda m: "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", lambda m: f"mid.attn_1.{m[1]}."),
    (r"mid_block\.attentions\.0\.to_out\.0", lambda m: "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)", lambda m: f"down.{m[1]}"),
    (r"up_blocks\.(\d)", lambda m: f"up.{len(CONFIG.widths) - 1 - int(m[1])}"),
    (r"\.resnets\.", lambda m: ".block."),
    (r"\.(down|up)samplers\.0", lambda m: f".{m[1]}sample"),
    (r"conv_shortcut", lambda m: "nin_shortcut"),
    (r"conv_norm_out", lambda m: "norm_out"),
)


@pytest.fixture(scope="module")
def oracle() -> AutoencoderKL:
    torch.manual_seed(1)
    levels = len(CONFIG.widths)
    model = AutoencoderKL(
        block_out_channels=CONFIG.widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=CONFIG.blocks,
        latent_channels=CONFIG.latent_channels,
        norm_num_groups=CONFIG.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = CONFIG.eps
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval().requires_grad_(False)


def state_of(oracle: AutoencoderKL) -> dict[str, Tensor]:
    """The oracle's weights under the names of the FLUX file."""
    state = {}
    for name, tensor in oracle.state_dict().items():
        linear_attention = re.search(r"to_(q|k|v|out\.0)\.weight", name)
        for pattern, rename in RENAMES:
            name = re.sub(pattern, rename, name)
        state[name] = (tensor[:, :, None, None] if linear_attention else tensor).clone().contiguous()
    return state


@pytest.fixture
def vae_file(oracle: AutoencoderKL, tmp_path: Path) -> Path:
    path = tmp_path / "ae.safetensors"
    save_file(state_of(oracle), path, metadata={"usoflow.config": json.dumps(DECLARED)})
    return path


@pytest.fixture
def vae(vae_file: Path) -> AutoEncoder:
    component = TensorFile.open(vae_file).component("vae")
    return build(component, lambda: AutoEncoder(VaeConfig.from_component(component)))


def test_config_follows_from_shapes_and_declaration(vae_file: Path) -> None:
    component = TensorFile.open(vae_file).component("vae")
    assert VaeConfig.from_component(component) == CONFIG
    assert CONFIG.factor == 4
    assert LatentFormat.from_component(component) == LatentFormat(scale=0.5, shift=-0.25)


def test_undeclared_groups_that_do_not_divide_are_refused(oracle: AutoencoderKL, tmp_path: Path) -> None:
    save_file(state_of(oracle), tmp_path / "ae.safetensors")
    with pytest.raises(UsoflowError, match="32 groups") as caught:
        VaeConfig.from_component(TensorFile.open(tmp_path / "ae.safetensors").component("vae"))
    assert caught.value.code == "model_unsupported"


@pytest.mark.parametrize(("height", "width"), [(16, 16), (28, 12)])
def test_encode_equals_diffusers(oracle: AutoencoderKL, vae: AutoEncoder, height: int, width: int) -> None:
    images = torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(0))
    expected = oracle.encode(images.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert relative(vae.encode(images), expected) < 1e-5


def test_decode_equals_diffusers(oracle: AutoencoderKL, vae: AutoEncoder) -> None:
    latent = 3 * torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = ((oracle.decode(latent).sample + 1) / 2).movedim(1, -1)
    images = vae.decode(latent)
    assert images.shape == (2, 20, 28, 3)
    assert relative(images, expected.clamp(0, 1)) < 1e-5
    assert not torch.equal(expected, expected.clamp(0, 1)), "the case must exercise the clamp"


def test_encode_takes_three_channels_of_the_centre(vae: AutoEncoder) -> None:
    images = torch.rand(1, 18, 23, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.encode(images[:, 1:17, 1:21, :3])  # 18 = 16 + 2, 23 = 20 + 3: cut 1 before, 1 and 2 after
    assert torch.equal(vae.encode(images), expected)


def test_computes_in_the_dtype_asked_for(vae: AutoEncoder) -> None:
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    wide, narrow = vae.decode(latent), vae.decode(latent, dtype=torch.bfloat16)
    assert narrow.dtype == torch.float32
    assert 1e-4 < relative(narrow, wide) < 3e-2


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(UsoflowError, match="100x7") as caught:
        centre_crop(torch.zeros(1, 7, 100, 3), 8)
    assert caught.value.code == "picture_size"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_name_the_stage(vae: AutoEncoder, value: float) -> None:
    with pytest.raises(UsoflowError, match="VAE decoding") as caught:
        vae.decode(torch.full((1, 4, 2, 2), value))
    assert caught.value.code == "non_finite"
    with pytest.raises(UsoflowError, match="VAE encoding"):
        vae.encode(torch.full((1, 8, 8, 3), value))


def test_latent_format_is_the_published_affine_map() -> None:
    z = torch.tensor([0.1159, 1.1159])
    assert torch.allclose(LatentFormat().to_model(z), torch.tensor([0.0, 0.3611]), atol=1e-7)
    assert torch.allclose(LatentFormat().from_model(LatentFormat().to_model(z)), z, atol=1e-7)


def test_goldens(synth_models: Path, golden: Callable[[str], Golden]) -> None:
    component = TensorFile.open(synth_models / "checkpoints/flux1-dev-bf16.safetensors").component("vae")
    config = VaeConfig.from_component(component)
    assert config == VaeConfig()
    vae = build(component, lambda: AutoEncoder(config))
    image = torch.from_numpy(synth.image("vae", 128, 96).astype(np.float32) / 255)[None]
    latent = torch.from_numpy(synth.tensor("vae.z", (1, 16, 16, 12), (2.0, 0.0)))
    for name, result in (("encode.128x96", vae.encode(image)), ("decode.16x12", vae.decode(latent))):
        report = golden("vae").check(name, result.numpy(), 1e-4)
        assert report["ok"], report


@pytest.fixture(scope="module")
def pocket_vae() -> AutoEncoder:
    """A VAE in whose pictures something can be seen."""
    path = POCKET_MODELS / "checkpoints" / "usoflow-pocket.safetensors"
    return load_vae(TensorFile.open(path).components()["vae"])


def drawn_picture() -> Tensor:
    """Soft colours and edges, [1, 160, 128, 3]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 160), torch.linspace(0, 1, 128), indexing="ij")
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.08).float()
    return torch.stack([0.8 * disc + 0.2 * x, y, 1 - 0.7 * disc], dim=-1)[None]


def test_pictures_for_which_there_is_room_are_whole(pocket_vae: AutoEncoder) -> None:
    picture = drawn_picture()
    whole = pocket_vae.encode(picture)
    assert torch.equal(pocket_vae.encode(picture, room=1 << 30), whole)
    assert torch.equal(pocket_vae.decode(whole, room=1 << 30), pocket_vae.decode(whole))


@pytest.mark.parametrize(("room", "side"), [(None, 2896), (1 << 50, 2896), (1 << 30, 1448)])
def test_no_map_on_cuda_has_more_numbers_than_its_kernels_take(room: int | None, side: int) -> None:
    config = VaeConfig(widths=(128, 256, 512, 512))
    with torch.device("meta"):
        module = AutoEncoder(config)
    allowed = _within_kernels(room, torch.float32)
    for beyond in (side // 8 - 2, side // 8 + 2):
        needed = module.decoding_bytes(torch.empty(1, 16, beyond, beyond, device="meta"), torch.float32)
        numbers = 256 * (8 * beyond) ** 2
        assert (needed <= allowed) == (numbers < 2**31 and needed <= (room or needed))


def test_decoding_on_cuda_asks_for_that(pocket_vae: AutoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int | None] = []
    monkeypatch.setattr(AutoEncoder, "_grid", lambda self, batch, needed, room, **more: rooms.append(room))
    monkeypatch.setattr(AutoEncoder, "_on_cuda", property(lambda self: True))
    pocket_vae.decode(torch.zeros(1, 16, 2, 2))
    assert rooms == [_within_kernels(None, torch.float32)]


@pytest.mark.parametrize("room", [2_000_000, 1])
def test_without_room_the_vae_works_in_tiles(
    pocket_vae: AutoEncoder, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same size, and hardly another picture."""
    picture = drawn_picture()
    with caplog.at_level("INFO"):
        latent = pocket_vae.encode(picture, room=room)
        made = pocket_vae.decode(latent, room=room)
    assert caplog.text.count("The VAE works in tiles") == 2
    whole = pocket_vae.decode(pocket_vae.encode(picture))
    assert latent.shape == (1, 16, 20, 16)
    assert made.shape == whole.shape
    assert not torch.equal(made, whole)
    assert float((made - whole).square().mean()) < 10**-2.5  # 25 dB

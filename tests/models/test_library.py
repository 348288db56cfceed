"""The library: one module per file, split files as good as one, narrower storage, changed files."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import lora_of, relative, transformer_of, velocity
from untrained import FLUX, write_untrained
from usoflow.errors import UsoflowError
from usoflow.models import pages, vae
from usoflow.models.checkpoint import CONFIG_KEY, Component, TensorFile
from usoflow.models.flux import Flux
from usoflow.models.flux_config import FluxConfig
from usoflow.models.library import ModelLibrary
from usoflow.models.loading import load_clip, load_flux, load_vae
from usoflow.models.lora_layouts import LoraUse
from usoflow.models.placement import Placement, is_out_of_memory, widen_fp8
from usoflow.models.residence import stored_bytes
from usoflow.models.text import TextEncoding
from usoflow.models.tiling import Grid
from usoflow.models.vae import AutoEncoder

CPU32 = Placement(torch.device("cpu"), torch.float32)
CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"
# The published single files have the checkpoint's names without its prefixes.
SPLIT = {
    "flux": ("diffusion_models/flux1-dev.safetensors", "model.diffusion_model."),
    "clip_l": ("text_encoders/clip_l.safetensors", "text_encoders.clip_l.transformer."),
    "t5": ("text_encoders/t5xxl_fp16.safetensors", "text_encoders.t5xxl.transformer."),
    "vae": ("vae/ae.safetensors", "vae."),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_untrained(root)
    tensors, config = load_file(root / CHECKPOINT), TensorFile.open(root / CHECKPOINT).metadata
    for path, prefix in SPLIT.values():
        (root / path).parent.mkdir(exist_ok=True)
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if "clip_l" in path:  # what the published file has beside the encoder
            own |= {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}
        save_file(own, root / path, metadata={CONFIG_KEY: config[CONFIG_KEY]})
    return root


def components(models: Path) -> tuple[dict[str, Component], dict[str, Component]]:
    """The same models from the all-in-one file and from files of their own."""
    whole = dict(TensorFile.open(models / CHECKPOINT).components())
    return whole, {kind: TensorFile.open(models / path).component(kind) for kind, (path, _) in SPLIT.items()}


@pytest.mark.parametrize("declared", [False, True])
def test_a_transformer_of_few_blocks_is_called_shallow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, declared: bool
) -> None:
    """But for one whose file declares its sizes, as ours do."""
    config = dataclasses.replace(FLUX, hidden=128, head_dim=128, axes=FluxConfig.axes)
    tensors = {f"model.diffusion_model.{name}": value for name, value in Flux(config).state_dict().items()}
    metadata = {CONFIG_KEY: json.dumps({"flux": {"axes": config.axes}})} if declared else None
    save_file(tensors, tmp_path / "few.safetensors", metadata=metadata)
    with caplog.at_level("WARNING", "usoflow"):
        load_flux(TensorFile.open(tmp_path / "few.safetensors").component("flux"))
    blocks = f"{FLUX.double_blocks} double and {FLUX.single_blocks} single blocks (FLUX.1 has 19 and 38)"
    assert [record.message for record in caplog.records] == (
        [] if declared else [f"few.safetensors is shallow: {blocks}."]
    )


@torch.inference_mode()
def test_a_step_can_be_stopped_between_blocks(models: Path) -> None:
    """With LoRAs, too; on a CPU a step of the real size takes minutes."""
    library = ModelLibrary(CPU32)
    flux = library.flux(transformer_of(models), (LoraUse(lora_of(models), 1.0),), "default")
    asked: list[None] = []

    def check() -> None:
        asked.append(None)
        if len(asked) == 2:
            raise KeyboardInterrupt

    library.begin_run(check)
    with pytest.raises(KeyboardInterrupt):
        velocity(flux)
    library.begin_run()
    assert velocity(flux).isfinite().all()


@torch.inference_mode()
def test_encoding_a_prompt_can_be_stopped_between_blocks(models: Path) -> None:
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    library.encode_text(whole["clip_l"], whole["t5"], "a cat")  # both files are read

    def check() -> None:
        raise UsoflowError("cancelled", "enough")

    library.begin_run(check)
    with pytest.raises(UsoflowError, match="enough"):
        library.encode_text(whole["clip_l"], whole["t5"], "a dog")
    library.begin_run()
    assert library.encode_text(whole["clip_l"], whole["t5"], "a dog").context.isfinite().all()


@torch.inference_mode()
def test_split_files_are_the_checkpoint(models: Path) -> None:
    library, (whole, split) = ModelLibrary(CPU32), components(models)
    images = torch.rand(1, 32, 32, 3)

    def outputs(part: dict[str, Component]) -> list[Tensor]:
        text = library.encode_text(part["clip_l"], part["t5"], "a cat")
        latent = library.vae_encode(part["vae"], images)
        flux = library.flux(part["flux"], (), "default")
        inputs = flux.prepare(text.context, text.pooled, (4, 4))
        return [text.context, text.pooled, latent, flux(latent, torch.tensor(0.5), inputs)]

    for one, other in zip(outputs(whole), outputs(split), strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_one_transformer_is_held_at_a_time(models: Path) -> None:
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    first = weakref.ref(library.flux(whole["flux"], (), "default"))
    assert first() is library.flux(whole["flux"], (), "default")
    library.flux(whole["flux"], (), "fp8_e4m3fn")
    gc.collect()
    assert first() is None


def test_narrow_storage(models: Path) -> None:
    """weight_dtype fp8_e4m3fn: the blocks' weights are stored so, the rest stays, the result is near."""
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    wide, narrow = (library.flux(whole["flux"], (), dtype) for dtype in ("default", "fp8_e4m3fn"))
    assert narrow.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn
    assert narrow.img_in.weight.dtype == torch.float16  # as stored: only blocks are narrowed
    torch.manual_seed(0)
    latent, text = torch.randn(1, 16, 4, 4), torch.randn(1, 4, FLUX.text_dim)
    first, second = (
        model(latent, torch.tensor(0.5), model.prepare(text, torch.zeros(1, FLUX.pooled_dim), (4, 4)))
        for model in (wide, narrow)
    )
    error = float((first - second).norm() / first.norm())
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_what_has_a_scale_is_not_narrowed(models: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Stored in e5m2 it may be larger than e4m3's largest number."""
    name, path = "double_blocks.0.img_attn.qkv", models / SPLIT["flux"][0]
    tensors = load_file(path)
    wide = tensors[f"{name}.weight"].float()
    scale = wide.abs().max() / torch.finfo(dtype).max
    tensors |= {f"{name}.weight": (wide / scale).to(dtype), f"{name}.scale_weight": scale}
    save_file(tensors, tmp_path / "scaled.safetensors", metadata=dict(TensorFile.open(path).metadata))
    with torch.no_grad():
        narrow = load_flux(TensorFile.open(tmp_path / "scaled.safetensors").component("flux"))
        ModelLibrary(CPU32)._narrow(narrow)
    assert narrow.double_blocks[0].img_attn.qkv.weight.dtype == dtype
    assert narrow.double_blocks[0].img_mlp["0"].weight.dtype == torch.float8_e4m3fn
    assert relative(narrow.double_blocks[0].img_attn.qkv.plain_weight(torch.float32), wide) < 0.1


def test_each_file_is_loaded_once_until_it_changes(models: Path, tmp_path: Path) -> None:
    write_untrained(tmp_path)
    library = ModelLibrary(CPU32)

    def flux() -> torch.nn.Module:
        return library.flux(TensorFile.open(tmp_path / CHECKPOINT).component("flux"), (), "default")

    first = flux()
    assert flux() is first
    write_untrained(tmp_path, seed=1)
    changed = flux()
    assert not torch.equal(changed.img_in.weight, first.img_in.weight)
    assert len(library._modules) == 1  # the older one is forgotten


def test_placement_of_what_is_not_there() -> None:
    from usoflow.errors import UsoflowError

    absent = next(name for name in ("cuda", "mps") if name not in _here())
    for device, dtype in ((absent, "auto"), ("gpu", "auto"), ("cpu", "float16"), ("cuda:1", "auto")):
        with pytest.raises(UsoflowError) as caught:
            Placement.choose(device, dtype)
        assert caught.value.code == "device_unavailable"


def test_a_gpu_is_the_one_of_the_thread_that_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread another one may be current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("usoflow.models.placement._compute_on", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for asked in ("auto", "cuda"):
        assert Placement.choose(asked).device == torch.device("cuda", 1)


def test_a_gpu_that_cannot_be_used_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is busy or full, or this torch has no kernels for it."""

    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("usoflow.models.placement._compute_on", refuse)
    with pytest.raises(
        UsoflowError, match=r"cannot be used: CUDA error: no kernel image is available$"
    ) as caught:
        Placement.choose("cuda")
    assert caught.value.code == "device_unavailable"
    assert "--device cpu" in caught.value.remedy


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, ran_out: bool) -> None:
    assert is_out_of_memory(error) == ran_out


@torch.inference_mode()
def test_what_goes_to_a_device_is_read_ahead(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without values stands for a GPU."""
    asked: list[pages.Range] = []
    monkeypatch.setattr(pages, "bring", asked.extend)
    module = load_vae(components(models)[0]["vae"])
    wanted = pages.mapped(module.parameters())
    Placement(torch.device("meta"), torch.float32).settle(module)
    assert module.decoder.conv_in.weight.is_meta
    assert asked == wanted != []


def _here() -> set[str]:
    found = {"cuda"} if torch.cuda.is_available() else set()
    return found | ({"mps"} if torch.backends.mps.is_available() else set())


@torch.inference_mode()
def test_what_was_encoded_before_needs_no_file(models: Path, tmp_path: Path) -> None:
    """Prompt, pictures and style tokens are known by content, though the models are forgotten and gone."""
    root = tmp_path / "models"
    shutil.copytree(models, root)
    whole = TensorFile.open(root / CHECKPOINT).components()
    (vision,) = TensorFile.open(next(root.glob("clip_vision/*"))).components().values()
    (projector,) = TensorFile.open(next(root.glob("model_patches/*"))).components().values()
    library, images = ModelLibrary(CPU32), torch.rand(1, 32, 32, 3)

    def outputs(images: Tensor) -> list[Tensor]:
        seen = library.encode_vision(vision, images, "none").hidden
        return [
            library.encode_text(whole["clip_l"], whole["t5"], "a cat").context,
            library.vae_encode(whole["vae"], images),
            library.style_tokens(projector, {layer: state.clone() for layer, state in seen.items()}),
        ]

    first = outputs(images)
    library.make_smaller()
    shutil.rmtree(root)
    for before, after in zip(first, outputs(images.clone()), strict=True):
        assert torch.equal(before, after)
    with pytest.raises(UsoflowError):
        outputs(images + 0.1)


@torch.inference_mode()
def test_an_encoder_that_does_not_fit_takes_the_transformers_place(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it does not fit with what it computes, and then would; the budget stays as it was."""
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    vae = stored_bytes(library._module(whole["vae"], load_vae))

    def stays(free: int, side: int) -> bool:
        """Whether the transformer does where so many bytes are free beside it."""
        transformer = weakref.ref(library.flux(whole["flux"], (), "default"))
        monkeypatch.setattr(Placement, "fits", lambda _, needed, freed=0: needed <= free + freed)
        library.vae_encode(whole["vae"], torch.rand(1, side, side, 3))
        gc.collect()
        return transformer() is not None

    work = library._module(whole["vae"], load_vae).encoding_bytes(torch.zeros(1, 64, 64, 3), torch.float32)
    assert stays(vae + work, 64)
    assert not stays(vae + work - 1, 64)
    assert stays(vae + work - 1, 32)
    assert not stays(vae - 1, 32)
    assert stays(vae - 1 - 10**12, 32)  # where its place would not be enough, the CPU computes
    assert library.placement == CPU32


@torch.inference_mode()
def test_a_vae_works_in_tiles_beside_the_transformer(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is room for good tiles; to load the transformer again would take longer."""
    monkeypatch.setattr(vae, "GOOD_TILE", 4)
    monkeypatch.setattr(vae, "LEAST_TILE", 2)
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    module, images, latents = load_vae(whole["vae"]), torch.rand(1, 64, 64, 3), torch.randn(1, 16, 8, 8)
    encoding = module.encoding_bytes(images[:, :32, :32], torch.float32)
    decoding = module.decoding_bytes(latents[..., :4, :4], torch.float32)

    def stays(room: int, compute: Callable[[], Tensor]) -> bool:
        """Whether the transformer does where so many bytes are left beside it and the VAE."""
        transformer = library.flux(whole["flux"], (), "default")
        monkeypatch.setattr(Placement, "room", property(lambda _: room))
        monkeypatch.setattr(
            Placement, "fits", lambda _, needed, freed=0: needed <= stored_bytes(module) + room
        )
        caplog.clear()
        compute()
        assert "tiles of 32 pixels" in caplog.text or room < encoding
        return library.flux(whole["flux"], (), "default") is transformer

    caplog.set_level("INFO", "usoflow")
    assert stays(encoding, lambda: library.vae_encode(whole["vae"], images))
    assert stays(decoding, lambda: library.vae_decode(whole["vae"], latents))
    assert not stays(encoding - 1, lambda: library.vae_encode_once(whole["vae"], images))


@torch.inference_mode()
def test_for_all_tiles_of_a_picture_the_vae_comes_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    borrow, borrowed, sizes = Placement.borrow, [], []

    def watched(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(module: AutoEncoder, x: Tensor, **options: Any) -> Tensor:
            sizes.append(tuple(x.shape))
            return compute(module, x, **options)

        return computed

    monkeypatch.setattr(AutoEncoder, "encode", watched(AutoEncoder.encode))
    monkeypatch.setattr(AutoEncoder, "decode", watched(AutoEncoder.decode))
    monkeypatch.setattr(Placement, "borrow", lambda *given: borrowed.append(given) or borrow(*given))
    encoded = library.vae_encode_once(whole["vae"], torch.rand(1, 128, 96, 3), tiles=Grid(8, 0, 8, 1))
    assert encoded.shape == (1, 16, 16, 12)
    assert sizes == [(1, 64, 64, 3)] * 4
    decoded = library.vae_decode(whole["vae"], encoded, tiles=Grid(8, 0, 1, 8))
    assert decoded.shape == (1, 128, 96, 3)
    assert sizes[4:] == [(1, 16, 8, 8)] * 4
    assert len(borrowed) == 2


@torch.inference_mode()
def test_an_encoder_that_fits_nowhere_is_computed_by_the_cpu(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one is that is asked for there; a device without values stands for a GPU."""
    whole, _ = components(models)
    expected = ModelLibrary(CPU32).encode_text(whole["clip_l"], whole["t5"], "a cat")
    library = ModelLibrary(Placement(torch.device("meta"), torch.float32))
    there = library.encode_text(whole["clip_l"], whole["t5"], "a cat", on_cpu=True)
    assert torch.equal(there.context, expected.context)
    assert not caplog.records
    caplog.set_level("INFO")
    monkeypatch.setattr(Placement, "fits", lambda self, needed, freed=0: False)
    there = library.encode_text(whole["clip_l"], whole["t5"], "a cat on a mat")
    assert there.context.device.type == "cpu"
    assert "T5Encoder does not fit" in caplog.text


@torch.inference_mode()
def test_what_a_gpu_has_no_room_for_is_computed_as_a_cpu_does(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU's memory and dtype, not with the little that the GPU has."""
    whole, _ = components(models)
    images = torch.rand(1, 64, 64, 3)
    wanted = ModelLibrary(CPU32).vae_encode(whole["vae"], images)
    gpu = Placement(torch.device("meta"), torch.bfloat16, budget=1000)
    assert gpu.on_cpu.budget is None
    monkeypatch.setattr(Placement, "fits", lambda self, needed, freed=0: False)
    assert torch.equal(ModelLibrary(gpu).vae_encode(whole["vae"], images), wanted)


@torch.inference_mode()
def test_long_work_can_be_ended(models: Path) -> None:
    """Between pictures, and before and after a file is read."""
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 5:
            raise UsoflowError("cancelled", "enough")

    library.begin_run(check)
    with pytest.raises(UsoflowError, match="enough"):
        library.vae_decode(whole["vae"], torch.zeros(8, 16, 4, 4))
    assert len(asked) == 5  # two for the file, three pictures
    library.begin_run()
    assert len(library.vae_decode(whole["vae"], torch.zeros(8, 16, 4, 4))) == 8


@torch.inference_mode()
def test_kept_encodings_are_bounded_in_number_and_bytes(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, (whole, _) = ModelLibrary(CPU32), components(models)

    def encode(seed: int) -> None:
        torch.manual_seed(seed)
        library.vae_encode(whole["vae"], torch.rand(1, 32, 32, 3))

    for seed in range(20):
        encode(seed)
    assert len(library._encodings) == 16
    monkeypatch.setattr("usoflow.models.library.KEPT_BYTES", 3 * 16 * 4 * 4 * 4)  # three latents
    encode(20)
    assert len(library._encodings) == 3
    monkeypatch.setattr("usoflow.models.library.KEPT_BYTES", 1)
    encode(21)
    assert len(library._encodings) == 1  # the last is always there


def test_what_passes_through_a_small_memory_is_not_copied(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fp8 copies beyond the budget would not leave, as pages of the file do."""
    whole, _ = components(models)
    small = Placement(torch.device("cpu"), torch.float32, budget=1000)
    with torch.inference_mode():
        flux = ModelLibrary(small).flux(whole["flux"], (), "fp8_e4m3fn")
    assert flux.double_blocks[0].img_attn.qkv.weight.dtype == torch.float16
    assert "stay as stored" in caplog.text


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_copies_that_a_gpus_host_has_no_memory_for_are_not_made(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    """All would be there at once before the first is on the GPU. Apple's have no fp8 at all."""
    whole, _ = components(models)
    library, flux = ModelLibrary(Placement(torch.device(device), torch.bfloat16)), load_flux(whole["flux"])
    free = 1000 if device == "cuda" else 10**12
    monkeypatch.setattr("usoflow.models.placement.free_memory", lambda: free)
    library._narrow(flux)
    assert flux.double_blocks[0].img_attn.qkv.weight.dtype == torch.float16
    assert "stay as stored" in caplog.text
    if device == "cuda":
        monkeypatch.setattr("usoflow.models.placement.free_memory", lambda: 10**12)
        library._narrow(flux)
        assert flux.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn


def test_a_file_of_all_of_clip_is_a_text_encoder(models: Path, tmp_path: Path) -> None:
    """With the vision tower and projections beside it, as openai/clip-vit-large-patch14 has them."""
    _, split = components(models)
    whole = load_file(split["clip_l"].file.path)
    whole |= {
        "vision_model.embeddings.patch_embedding.weight": torch.ones(2, 3, 2, 2),
        "vision_model.pre_layrnorm.weight": torch.ones(2),
        "visual_projection.weight": torch.ones(2, 2),
    }
    save_file(whole, tmp_path / "clip.safetensors", metadata=dict(split["clip_l"].file.metadata))
    found = TensorFile.open(tmp_path / "clip.safetensors").component("clip_l")
    assert not any(name.startswith("vision_model") for name in found.tensors)
    for (name, got), wanted in zip(
        load_clip(found).named_parameters(), load_clip(split["clip_l"]).parameters(), strict=True
    ):
        assert torch.equal(got, wanted), name


def test_a_transformer_that_is_given_more_than_a_latent_is_named(models: Path, tmp_path: Path) -> None:
    """FLUX.1 Fill takes the masked picture and the mask beside the latent."""
    _, split = components(models)
    tensors = load_file(split["flux"].file.path)
    wide = tensors["img_in.weight"]
    tensors["img_in.weight"] = torch.zeros(len(wide), 384, dtype=wide.dtype)
    save_file(tensors, tmp_path / "fill.safetensors", metadata=dict(split["flux"].file.metadata))
    with pytest.raises(UsoflowError, match="takes 96 channels and makes 16") as error:
        load_flux(TensorFile.open(tmp_path / "fill.safetensors").component("flux"))
    assert error.value.code == "model_unsupported"


def test_a_transformer_in_four_bits_of_bitsandbytes_is_named(models: Path, tmp_path: Path) -> None:
    _, split = components(models)
    tensors = load_file(split["flux"].file.path)
    name = "double_blocks.0.img_attn.qkv.weight"
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    tensors[name + ".absmax"] = torch.ones(4)
    save_file(tensors, tmp_path / "nf4.safetensors", metadata=dict(split["flux"].file.metadata))
    with pytest.raises(UsoflowError, match="bitsandbytes") as error:
        load_flux(TensorFile.open(tmp_path / "nf4.safetensors").component("flux"))
    assert "GGUF" in error.value.remedy


def test_forgetting_everything_also_forgets_that_memory_ran_out() -> None:
    asked = Placement(torch.device("cpu"), torch.float32, budget=1000)
    library = ModelLibrary(asked)
    library.make_smaller()
    assert library.placement.budget == 500
    library.clear()
    assert library.placement == asked


def test_fp8_is_widened_without_loss_where_a_device_has_none() -> None:
    """Every value of either format; NaN stays NaN."""
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        layer = torch.nn.Linear(16, 16).requires_grad_(False)
        stored = every.view(dtype).reshape(16, 16)
        layer.weight = torch.nn.Parameter(stored, requires_grad=False)
        widen_fp8(layer)
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight.float().nan_to_num(7.5), stored.float().nan_to_num(7.5))
        assert layer.bias.dtype == torch.float32


def test_the_vae_computes_in_bf16_only_where_the_transformer_does() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    wide, narrow, half = torch.float32, torch.bfloat16, torch.float16
    asked = [(cuda, narrow), (cuda, half), (cuda, wide), (cpu, narrow)]
    assert [Placement(*one).vae_dtype for one in asked] == [narrow, wide, wide, wide]


@torch.inference_mode()
def test_t5_multiplies_in_bf16_only_where_a_cpu_is_left_to_choose(models: Path) -> None:
    """Else as the reference does, in fp32."""
    whole, cpu, narrow = components(models)[0], torch.device("cpu"), torch.bfloat16
    exact, asked, ours = (
        ModelLibrary(placement).encode_text(whole["clip_l"], whole["t5"], "a (red:1.4) cat")
        for placement in (CPU32, Placement(cpu, narrow), Placement(cpu, narrow, fastest=True))
    )
    assert torch.equal(asked.context, exact.context)
    assert 1e-5 < relative(ours.context, exact.context) < 3e-2
    assert torch.equal(ours.pooled, exact.pooled)


@torch.inference_mode()
def test_each_encoder_has_its_own_prompt(models: Path) -> None:
    library, (whole, _) = ModelLibrary(CPU32), components(models)

    def encoded(clip: str | None, prompt: str = "a cat") -> TextEncoding:
        return library.encode_text(whole["clip_l"], whole["t5"], prompt, clip_prompt=clip)

    both, empty, other = encoded(None), encoded(""), encoded("a dog")
    assert torch.equal(both.context, empty.context)
    assert torch.equal(both.context, other.context)
    assert torch.equal(empty.pooled, encoded(None, "").pooled)
    assert not torch.equal(other.pooled, both.pooled)
    assert not torch.equal(other.pooled, empty.pooled)


@torch.inference_mode()
def test_what_was_encoded_may_be_changed(models: Path) -> None:
    """Custom nodes do; what is kept stays."""
    library, (whole, _), images = ModelLibrary(CPU32), components(models), torch.rand(1, 32, 32, 3)

    def outputs() -> list[Tensor]:
        text = library.encode_text(whole["clip_l"], whole["t5"], "a cat")
        return [text.context, text.pooled, library.vae_encode(whole["vae"], images)]

    wanted = [values.clone() for values in outputs()]
    for values in outputs():
        values.zero_()
    for found, expected in zip(outputs(), wanted, strict=True):
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_pictures_of_the_same_bytes_differ_by_shape(models: Path) -> None:
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    wide, high = (library.vae_encode(whole["vae"], torch.ones(1, *s, 3)) for s in ((16, 32), (32, 16)))
    assert wide.shape == high.mT.shape


@torch.inference_mode()
def test_what_was_asked_for_again_is_kept_longest(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usoflow.models.library.KEPT_ENCODINGS", 2)
    library, (whole, _) = ModelLibrary(CPU32), components(models)
    encoded: list[float] = []
    once = library.vae_encode_once

    def watched(component: Component, images: Tensor) -> Tensor:
        encoded.append(float(images.mean()))
        return once(component, images)

    monkeypatch.setattr(library, "vae_encode_once", watched)
    for value in (0.0, 1.0, 0.0, 0.5, 0.0):
        library.vae_encode(whole["vae"], torch.full((1, 16, 16, 3), value))
    assert encoded == [0.0, 1.0, 0.5]


@torch.inference_mode()
def test_the_vae_of_a_file_that_changed_is_forgotten(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    library = ModelLibrary(CPU32)
    for seed in (1, 2):
        vae = TensorFile.open(tmp_path / CHECKPOINT).component("vae")
        library.vae_decode(vae, torch.zeros(1, 16, 2, 2))
        write_untrained(tmp_path, seed=seed)
    assert len(library._modules) == 1


@torch.inference_mode()
def test_a_loras_strength_can_be_changed(small_models: Path) -> None:
    library, lora, name = ModelLibrary(CPU32), lora_of(small_models), "single_blocks.0.linear2"

    def strengths(strength: float) -> list[float]:
        flux = library.flux(transformer_of(small_models), (LoraUse(lora, strength),), "default")
        return [float(branch.strength) for branch in flux.get_submodule(name).branches]

    assert (strengths(1.0), strengths(0.5), strengths(0.0)) == ([1.0], [0.5], [])


@pytest.mark.parametrize("following", ["default", "fp8_e4m3fn"])
@torch.inference_mode()
def test_a_transformer_with_loras_is_not_held_beside_the_next(small_models: Path, following: str) -> None:
    """Neither beside another one, nor where the same one follows without LoRAs."""
    library, use = ModelLibrary(CPU32), LoraUse(lora_of(small_models), 1.0)
    first = weakref.ref(library.flux(transformer_of(small_models), (use,), "default"))
    library.flux(transformer_of(small_models), (), following)
    gc.collect()
    assert first() is None


def test_a_computation_has_no_more_room_than_the_budget() -> None:
    assert Placement(torch.device("cpu"), torch.float32, budget=1000).room == 1000
    assert CPU32.room > 1000


def test_no_pages_are_nothing_to_ask_the_system_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no library of C that answers to no name."""
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the system was asked"))
    pages.give_back([])
    pages.bring([])
    pages.read_ahead([])

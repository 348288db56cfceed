"""A model file that is missing is answered with where to get it, or with the file that is there instead."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from usoflow.api.at_hand import at_hand
from usoflow.catalogue import (
    KNOWN_FILES,
    UNO_RANK,
    KnownFile,
    known_file,
    missing,
    missing_file_remedy,
    pull_command,
)
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.inspection import inspect
from usoflow.settings import MODEL_FOLDERS, POCKET_MODELS, find_folders

# facts of https://docs.comfy.org/tutorials/flux/flux-1-uso, written down a second time
TUTORIAL = {
    "flux1-dev-fp8.safetensors": ("checkpoints", "Comfy-Org/flux1-dev", "17.2 GB", "non-commercial"),
    "uso-flux1-dit-lora-v1.safetensors": ("loras", "Comfy-Org/USO_1.0_Repackaged", "478 MB", "Apache-2.0"),
    "uso-flux1-projector-v1.safetensors": (
        "model_patches",
        "Comfy-Org/USO_1.0_Repackaged",
        "MB",
        "Apache-2.0",
    ),
    "sigclip_vision_patch14_384.safetensors": (
        "clip_vision",
        "Comfy-Org/sigclip_vision_384",
        "MB",
        "Apache-2.0",
    ),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def remedy(models: Path, folder: str, name: str) -> str:
    models.mkdir(exist_ok=True)
    return missing_file_remedy(folder, name, find_folders(models=models))


def test_every_file_of_the_tutorial() -> None:
    assert {file.name for file in KNOWN_FILES} == set(TUTORIAL)
    assert all(file.folder in MODEL_FOLDERS for file in KNOWN_FILES)


@pytest.mark.parametrize("name", TUTORIAL)
def test_link_folder_size_and_licence(models: Path, name: str) -> None:
    folder, repository, size, licence = TUTORIAL[name]
    text = remedy(models, folder, name)
    assert f"https://huggingface.co/{repository}/resolve/main/" in text
    assert f"/{name} (" in text
    assert str(models / folder) in text
    assert size in text
    assert licence in text
    assert "You have" not in text


@pytest.mark.parametrize("file", KNOWN_FILES, ids=lambda file: file.folder)
def test_the_same_kind_under_another_name(models: Path, small_models: Path, file: KnownFile) -> None:
    """Found by its tensors: ByteDance's names, or whatever somebody renamed it to."""
    (models / file.folder / "sub").mkdir(parents=True)
    shutil.copy(small_models / file.folder / file.name, models / file.folder / "sub" / "mine.safetensors")
    text = remedy(models, file.folder, file.name)
    assert "You have sub/mine.safetensors" in text
    assert file.url in text


@pytest.mark.parametrize(
    ("folder", "theirs", "ours"),
    [
        ("loras", "dit_lora.safetensors", "uso-flux1-dit-lora-v1.safetensors"),
        ("model_patches", "projector.safetensors", "uso-flux1-projector-v1.safetensors"),
    ],
)
def test_names_of_bytedance(models: Path, small_models: Path, folder: str, theirs: str, ours: str) -> None:
    known = known_file(folder, theirs)
    assert known is not None
    assert known.name == ours
    (models / folder).mkdir(parents=True)
    shutil.copy(small_models / folder / ours, models / folder / ours)
    assert f"You have {ours}" in remedy(models, folder, theirs)
    shutil.move(models / folder / ours, models / folder / theirs)
    assert f"You have {theirs}" in remedy(models, folder, ours)


def test_a_file_in_a_subfolder_or_of_bytedances_name_is_not_missing(models: Path, small_models: Path) -> None:
    shutil.copytree(small_models, models)
    for folder, name in (
        ("checkpoints", "flux/flux1-dev-fp8.safetensors"),
        ("loras", "dit_lora.safetensors"),
        ("model_patches", "uso/projector.safetensors"),
    ):
        (found,) = (models / folder).iterdir()
        (models / folder / name).parent.mkdir(exist_ok=True)
        found.rename(models / folder / name)
    folders = find_folders(models=models)
    assert missing(folders) == []
    assert set(at_hand(folders).names.values()) == {
        "flux/flux1-dev-fp8.safetensors", "dit_lora.safetensors", "uso/projector.safetensors",
        "sigclip_vision_patch14_384.safetensors",
    }  # fmt: skip
    assert at_hand(folders).notes == ()


def test_other_kinds_and_damaged_files_are_no_twins(models: Path, small_models: Path) -> None:
    (models / "loras").mkdir(parents=True)
    for path in small_models.rglob("*projector*.safetensors"):
        shutil.copy(path, models / "loras" / "other-kind.safetensors")
    lora = (small_models / "loras/uso-flux1-dit-lora-v1.safetensors").read_bytes()
    (models / "loras/half.safetensors").write_bytes(lora[: len(lora) // 2])
    (models / "loras/empty.safetensors").touch()
    assert "You have" not in remedy(models, "loras", "uso-flux1-dit-lora-v1.safetensors")


def test_a_lora_of_xlabs_is_no_twin(models: Path, small_models: Path) -> None:
    """Its names are USO's, in the double blocks alone; it may be applied all the same."""
    (models / "loras").mkdir(parents=True)
    uso = load_file(small_models / "loras/uso-flux1-dit-lora-v1.safetensors")
    path = models / "loras/anime.safetensors"
    save_file({name: tensor for name, tensor in uso.items() if "double_blocks" in name}, path)
    assert "You have" not in remedy(models, "loras", "uso-flux1-dit-lora-v1.safetensors")
    transformer = TensorFile.open(small_models / "checkpoints/flux1-dev-fp8.safetensors").component("flux")
    assert any("  fits" in line for line in inspect(path, transformer))


def test_only_part_of_a_checkpoint_is_no_twin(models: Path, small_models: Path) -> None:
    """A checkpoint must hold all four models; the vision tower holds none of them."""
    (models / "checkpoints").mkdir(parents=True)
    tower = small_models / "clip_vision/sigclip_vision_patch14_384.safetensors"
    shutil.copy(tower, models / "checkpoints/x.safetensors")
    assert "You have" not in remedy(models, "checkpoints", "flux1-dev-fp8.safetensors")


def test_unknown_file_is_answered_with_what_there_is(models: Path) -> None:
    (models / "loras").mkdir(parents=True)
    (models / "loras/b.safetensors").touch()
    text = remedy(models, "loras", "my.safetensors")
    assert "There are: b.safetensors" in text
    assert str(models / "loras") in text


def test_own_files_beside_the_pocket_models(
    tmp_path: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA of FLUX.1 may be there before its checkpoint is: the pocket models are not mixed with it."""
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path)
    monkeypatch.delenv("USOFLOW_MODELS", raising=False)
    lora = "uso-flux1-dit-lora-v1.safetensors"
    (tmp_path / "models" / "loras").mkdir(parents=True)
    shutil.copy(small_models / "loras" / lora, tmp_path / "models" / "loras" / "mine.safetensors")
    folders = find_folders()
    assert at_hand(folders).names == at_hand(find_folders(models=POCKET_MODELS)).names
    text = missing_file_remedy("loras", lora, folders)
    assert "You have mine.safetensors or usoflow-pocket" in text
    assert text.count("usoflow's own small one") == 1
    shutil.copy(small_models / "loras" / lora, tmp_path / "models" / "loras" / lora)
    assert at_hand(folders).names["loras"].startswith("usoflow-pocket")


def test_unknown_file_in_an_empty_folder(models: Path) -> None:
    assert "--models" in remedy(models, "vae", "my.safetensors")
    assert f"Put a.safetensors into {models / 'loras'}," in remedy(models, "loras", "/tmp/a.safetensors")


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin"])
def test_pickles(models: Path, name: str) -> None:
    assert "pickle" in remedy(models, "checkpoints", name)


def test_a_lora_of_uno_is_not_usos(models: Path, small_models: Path) -> None:
    """ByteDance gave both one name and layout; the rank tells them apart."""
    (models / "loras").mkdir(parents=True)
    uso = load_file(small_models / "loras/uso-flux1-dit-lora-v1.safetensors")
    wide = {}
    for name, tensor in uso.items():
        dimension = 0 if name.endswith("down.weight") else 1
        rest = [1, 1]
        rest[dimension] = UNO_RANK // tensor.shape[dimension] + 1
        wide[name] = tensor.repeat(rest).narrow(dimension, 0, UNO_RANK).contiguous()
    save_file(wide, models / "loras/dit_lora.safetensors")
    lora = known_file("loras", "uso-flux1-dit-lora-v1.safetensors")
    assert lora in missing(find_folders(models=models))
    save_file(uso, models / "loras/dit_lora.safetensors")
    assert lora not in missing(find_folders(models=models))


def test_models_of_other_families_do_not_take_the_checkpoints_place(models: Path, small_models: Path) -> None:
    """A VAE of Stable Diffusion and umT5 have what those of FLUX.1 are recognised by."""
    (models / "vae").mkdir(parents=True)
    checkpoint = load_file(small_models / "checkpoints/flux1-dev-fp8.safetensors")
    vae = {
        name.removeprefix("vae."): tensor for name, tensor in checkpoint.items() if name.startswith("vae.")
    }
    save_file(vae, models / "vae/one.safetensors")
    assert "vae" in TensorFile.open(models / "vae/one.safetensors").components()
    save_file(vae | {"quant_conv.weight": torch.ones(8, 8, 1, 1)}, models / "vae/one.safetensors")
    assert TensorFile.open(models / "vae/one.safetensors").components() == {}


def test_nans_of_t5s_table_in_fp8_are_no_damage(tmp_path: Path, small_models: Path) -> None:
    """What fp8 does not have became NaN, and is read as 0 (`models.text`); elsewhere a NaN is damage."""
    checkpoint = load_file(small_models / "checkpoints/flux1-dev-fp8.safetensors")
    prefix = "text_encoders.t5xxl.transformer."
    t5 = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items() if name.startswith(prefix)}
    t5["shared.weight"] = t5["shared.weight"].to(torch.float8_e4m3fn)
    t5["shared.weight"].view(torch.uint8)[0, 0] = 0x7F
    save_file(t5, tmp_path / "t5.safetensors")
    assert "  every value is finite" in list(inspect(tmp_path / "t5.safetensors", None))
    t5["encoder.final_layer_norm.weight"] = t5["encoder.final_layer_norm.weight"].float() * float("nan")
    save_file(t5, tmp_path / "t5.safetensors")
    with pytest.raises(UsoflowError, match="not finite"):
        list(inspect(tmp_path / "t5.safetensors", None))


def test_what_is_missing_is_pulled_to_where_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it was named: what is found through the variable or a file of paths lies elsewhere."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("USOFLOW_MODELS", f"{first}{os.pathsep}{second}")
    assert pull_command(find_folders()) == "usoflow models pull"
    lines = f"other:\n  base_path: {second}\n  checkpoints: checkpoints\n  is_default: true\n"
    (first / "extra_model_paths.yaml").write_text(lines)
    folders = find_folders(models=first)
    assert folders.models["checkpoints"][0] == second / "checkpoints"
    assert pull_command(folders) == f"usoflow models pull --models {first}"


def test_of_many_names_the_nearest_are_told(tmp_path: Path) -> None:
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    for number in range(300):
        (tmp_path / "loras" / f"style{number:03}.safetensors").touch()
    (tmp_path / "loras" / "sub" / "wool.safetensors").touch()
    advice = missing_file_remedy("loras", "wool.safetensors", find_folders(models=tmp_path))
    assert advice.startswith("There are: sub/wool.safetensors, ")
    assert advice.count(".safetensors") == 13  # and the one that is missing
    assert "and 289 more" in advice


def test_only_dead_links_in_a_model_folder_are_told(tmp_path: Path) -> None:
    """A client's name may be any: it must not learn where other links of the machine lead."""
    folders = find_folders(models=tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "dead.safetensors").symlink_to("/not/mounted/a.safetensors")
    (tmp_path / "vae" / "whole.ckpt").symlink_to(tmp_path)
    (tmp_path / "secret").symlink_to("/not/to/be/told")
    told = missing_file_remedy("vae", "dead.safetensors", folders)
    assert told.count("is a link to /not/mounted/a.safetensors, which is not there") == 1
    for name in ("whole.ckpt", "../secret", str(tmp_path / "secret"), "/proc/1/exe", "a\0b"):
        assert "is a link" not in missing_file_remedy("vae", name, folders)

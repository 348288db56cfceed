"""The loop resumes exactly, losses fall on what can be learnt by heart, and the package loads as usual."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.models.latent_format import LatentFormat
from usoflow.models.loading import load_clip, load_flux, load_t5, load_vae
from usoflow.models.text import encode_prompt
from usoflow.models.tokens import ClipTokenizer, T5Tokenizer, Tokenizers
from usoflow.training import autoencoder, kept, loop, package, states
from usoflow.training.autoencoder import VaeStage
from usoflow.training.base import BaseStage, Batches, Pocket, flow_loss, guided_loss, random_numbers
from usoflow.training.captions import Vocabulary
from usoflow.training.kept import fingerprint, whole
from usoflow.training.latents import LatentSet, encoded, require_same
from usoflow.training.loop import CPU, Recipe, Training, load_average
from usoflow.training.plan import Plan
from usoflow.training.stages import Workshop
from usoflow.training.text_to_image import sample

CAPTIONS = ["a cat on a beach", "a red apple in the snow, flat style", "an owl at sunset", "a bus"]
SIZES = {"hidden": 64, "double": 1, "single": 1, "text_dim": 32, "text_layers": 1, "clip_dim": 32}
SHORT = Recipe(samples=64, batch=4, rate=1e-3)
VAE = VaeStage(SHORT, widths=(8, 8, 8, 16))


def recipe(**changes: float) -> Recipe:
    return Recipe(**({"samples": 64, "batch": 4, "rate": 3e-3, "warmup": 0, "save_every": 1000} | changes))


def stage(**changes: float) -> BaseStage:
    return BaseStage(
        recipe(),
        recipe(),
        recipe(seed=1),
        side=32,
        cached=4,
        t5_length=12,
        clip_length=16,
        **(SIZES | changes),
    )


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "latents.npy", rng.standard_normal((4, 16, 4, 4)).astype(np.float16))
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    return Batches.of(LatentSet(tmp_path, seed=3), stage())


def pocket_of(batches: Batches, sizes: BaseStage | None = None) -> Pocket:
    return Pocket(sizes or stage(), *batches.vocabularies())


def trained(batches: Batches, folder: Path, *, until: int) -> Training:
    pocket = pocket_of(batches)
    training = Training(dict(pocket.named_parameters()), pocket.stage.recipe, folder)
    training.resume()
    training.run(
        flow_loss(pocket, pocket.stage.recipe, batches, dtype=torch.float32),
        after_save=lambda: None,
        until=until,
    )
    return training


def test_interrupted_training_equals_uninterrupted(batches: Batches, tmp_path: Path) -> None:
    whole = trained(batches, tmp_path / "whole", until=32)
    trained(batches, tmp_path / "parts", until=12)
    parts = trained(batches, tmp_path / "parts", until=32)
    assert [loss for _, loss in parts.log] == [loss for _, loss in whole.log]
    for name in whole.parameters:
        assert torch.equal(parts.parameters[name], whole.parameters[name]), name
        assert torch.equal(parts.average[name], whole.average[name]), name


def test_flow_loss_falls_on_one_batch(batches: Batches, tmp_path: Path) -> None:
    pocket = pocket_of(batches)
    fixed = flow_loss(pocket, pocket.stage.recipe, batches, dtype=torch.float32)
    training = Training(dict(pocket.named_parameters()), recipe(samples=400), tmp_path)
    losses = [training.step(lambda _: fixed(0)) for _ in range(100)]
    assert losses[0] == pytest.approx(2.0, rel=0.2)  # answer 0 to the difference of unit variances
    assert losses[-1] < 0.5 * losses[0]


def test_guided_student_begins_off_and_approaches_its_teacher(batches: Batches, tmp_path: Path) -> None:
    teacher, student = pocket_of(batches), pocket_of(batches)
    learning = Training(dict(teacher.named_parameters()), recipe(samples=4000), tmp_path)
    for _ in range(60):
        learning.step(flow_loss(teacher, recipe(), batches, dtype=torch.float32))
    student.load_state_dict(teacher.state_dict())
    fixed = guided_loss(student, teacher, batches, dtype=torch.float32)
    training = Training(dict(student.named_parameters()), recipe(samples=4000), tmp_path)
    losses = [training.step(lambda _: fixed(0)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_every_epoch_shows_every_scene_once(batches: Batches) -> None:
    for epoch in range(3):
        assert sorted(batches.latents.indices(epoch * 4, 4)) == [0, 1, 2, 3]
    across = batches.latents.indices(2, 4)
    assert list(across[:2]) == list(batches.latents.indices(0, 4)[2:])


def test_vocabulary_expands_to_the_official_table() -> None:
    words = Vocabulary.of(np.array([[7, 3], [900, 3]]))
    table = torch.arange(6.0).reshape(3, 2)
    full = words.expand(table, 1000)
    assert full.shape == (1000, 2)
    assert torch.equal(full[[3, 7, 900]], table)
    assert torch.equal(full[5], table[0])  # as `compact` takes an unknown word
    assert torch.equal(table[words.compact(np.array([900, 7, 3]))], full[[900, 7, 3]])


def test_folding_keeps_pictures_and_sets_statistics() -> None:
    module = autoencoder.new_autoencoder(VAE)
    with torch.no_grad():
        module.encoder.conv_out.bias.normal_(2.0, 1.0, generator=torch.Generator().manual_seed(0))
        module.decoder.conv_out.weight.mul_(0.2)
    images = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    before = autoencoder.encode(module, images)
    folded = autoencoder.folded(module, before)
    after = autoencoder.encode(folded, images)
    x = LatentFormat().to_model(after)
    assert x.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (x.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    wanted = module.decoder.conv_in(before)[..., 3:5, 3:5]  # which the zero padding does not reach
    assert torch.allclose(folded.decoder.conv_in(after)[..., 3:5, 3:5], wanted, atol=1e-4)
    # The same place in the picture; norms and attention tell it a little of the rim.
    found, plain, unlike = (
        autoencoder.decode(part, latents)[:, 24:40, 24:40]
        for part, latents in ((folded, after), (module, before), (module, after))
    )
    assert (found - plain).abs().max() < 0.02
    assert (unlike - plain).abs().max() > 0.2


def test_package_loads_and_computes_as_the_trained_modules(batches: Batches, tmp_path: Path) -> None:
    pocket, vae = pocket_of(batches), autoencoder.new_autoencoder(VAE)
    training = Training(dict(pocket.named_parameters()), recipe(), tmp_path)
    for _ in range(3):
        training.step(flow_loss(pocket, pocket.stage.recipe, batches, dtype=torch.float32))
    path = tmp_path / "pocket.safetensors"
    package.write(path, pocket, vae)
    parts = TensorFile.open(path).components()
    assert set(parts) == {"flux", "clip_l", "t5", "vae"}
    clip, t5, flux = load_clip(parts["clip_l"]), load_t5(parts["t5"]), load_flux(parts["flux"])
    tokenizers = Tokenizers(ClipTokenizer(clip.config.positions), T5Tokenizer(t5.config.min_length))
    text = encode_prompt(CAPTIONS[1], clip, t5, tokenizers)
    wanted = pocket.encode_texts([CAPTIONS[1]])
    assert t5.config.min_length == 12
    for got, exact in zip((text.context, text.pooled), wanted, strict=True):
        assert (got - exact).norm() < 0.1 * exact.norm()  # the tables are stored in fp8
    x, sigma = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    got = flux(x, sigma, flux.prepare(*wanted, (4, 4), guidance=3.5))
    exact = pocket.velocity(x, sigma, wanted, guidance=3.5, dtype=torch.float32)
    assert torch.allclose(got, exact, atol=5e-3)
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(load_vae(parts["vae"]).decode(latent), autoencoder.decode(vae, latent), atol=5e-3)


def test_samples_follow_from_the_seed(batches: Batches) -> None:
    pocket, vae = pocket_of(batches), autoencoder.new_autoencoder(VAE)
    pictures = [
        sample(pocket, vae, CAPTIONS[:2], side=32, dtype=torch.float32, seed=seed, steps=2)
        for seed in (1, 1, 2)
    ]
    assert pictures[0].shape == (2, 32, 32, 3)
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def test_shipped_plan_is_read_and_a_wrong_one_refused(tmp_path: Path) -> None:
    assert Plan.read(None).base.side == 64
    shipped = resources.files("usoflow.training").joinpath("configs", "pocket.toml").read_text("utf-8")
    (wrong := tmp_path / "wrong.toml").write_text(shipped.replace("[vae]", "[vae]\nbreadth = 3"))
    with pytest.raises(UsoflowError, match=r"vae\.breadth: no such setting") as error:
        Plan.read(wrong)
    assert error.value.code == "training_config"
    wrong.write_text(shipped.replace("rate = 2.5e-3", "rate = 'fast'").replace("[judge]", "[jury]"))
    with pytest.raises(UsoflowError, match=r"vae\.recipe\.rate: .*; judge: ") as error:  # all at once
        Plan.read(wrong)
    assert error.value.code == "training_config"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            'subject_mix = [["subject", 0.35], ["both", 0.38], ["style", 0.17], ["text", 0.1]]',
            'subject_mix = [["subject", 1.0]]',
        ),
        ('style_mix = [["style", 1.0]]', 'style_mix = [["style", 0.9], ["text", 0.1]]'),
        ('["both", 0.38]', '["beth", 0.38]'),
        ('["both", 0.38]', '["both", 0.4]'),
        ('["style", 0.28], ["both", 0.57]', '["style", -0.28], ["both", 1.13]'),
        ('flow_mix = [["style", 0.2], ', "flow_mix = ["),
        ("batch = 8", "batch = 0"),
        ("save_every = 8000", "save_every = 0"),
        ("samples = 56000", 'samples = "many"'),
        ("rate = 2.5e-3", "rate = 0"),
        ("steady = 0.3", "steady = 3"),
        ("large_side = 128", "large_side = 120"),
        ("words = 0.25", "words = 0.75"),
        ("rank = 80", "rank = 0"),
        ("[vae]\n", "vae = 3\n[vea]\n"),
        ("widths = [16, 32, 64, 128]", "widths = [16, 32, 64]"),
        ("widths = [16, 32, 64, 128]", "widths = [16, 32, 64, 128]\ngroups = 3"),
        ("widths = [16, 32, 64, 128]", "widths = [16, 32, 64, 128]\nside = 60"),
        ("widths = [16, 32, 64, 128]", "widths = [16, 32, 64, 128]\nblocks = 0"),
        ("heads = 3", "heads = 5"),
        ("dim = 96", "dim = 100"),
        ("patch = 16", "patch = 0"),
        ("drawn = 60000", "drawn = 0"),
        ("[reward]\ndrawn = 60000", "[reward]\ndrawn = 0"),
    ],
)
def test_a_training_file_that_would_fail_later_is_refused(tmp_path: Path, before: str, after: str) -> None:
    shipped = resources.files("usoflow.training").joinpath("configs", "pocket.toml").read_text("utf-8")
    assert before in shipped
    (tmp_path / "wrong.toml").write_text(shipped.replace(before, after, 1))
    with pytest.raises(UsoflowError) as error:
        Plan.read(tmp_path / "wrong.toml")
    assert error.value.code == "training_config"


def test_a_stage_names_the_one_that_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UsoflowError, match="The stage vae was not run") as error:
        Workshop(tmp_path, Plan.read(None)).trained_vae  # noqa: B018
    assert f"usoflow train vae --work {tmp_path}" in error.value.remedy


def test_an_autoencoder_of_other_widths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    torch.save(autoencoder.new_autoencoder(VAE).state_dict(), tmp_path / "vae" / "folded.pt")
    with pytest.raises(UsoflowError, match=r"folded\.pt is damaged or of other settings") as error:
        Workshop(tmp_path, Plan.read(None)).trained_vae  # noqa: B018
    assert error.value.code == "training_config"
    assert len(error.value.detail) < 500


def test_what_was_begun_from_another_base_does_not_go_on(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = autoencoder.new_autoencoder(VAE)
    for name, value in {"_batches": batches, "large_batches": batches, "trained_vae": vae}.items():
        monkeypatch.setattr(Workshop, name, value)
    plan = dataclasses.replace(Plan.read(None), base=stage())
    workshop = Workshop(tmp_path, plan, torch.float32)
    workshop.base()
    for _ in range(2):
        workshop.large()
    longer = dataclasses.replace(plan.base, recipe=recipe(samples=128))
    workshop = dataclasses.replace(workshop, plan=dataclasses.replace(plan, base=longer))
    workshop.base()
    with pytest.raises(UsoflowError, match="of other settings: frozen weights"):
        workshop.large()


def test_a_stage_that_was_interrupted_is_not_built_on(tmp_path: Path) -> None:
    recipe, parameters = Recipe(samples=64, batch=8, rate=1e-3), {"a": torch.nn.Parameter(torch.zeros(2))}
    training = Training(parameters, recipe, tmp_path / "large")
    for until in (32, 64):
        training.run(lambda done: parameters["a"].sum(), after_save=lambda: None, until=until)
        if until < recipe.samples:
            with pytest.raises(UsoflowError, match="large is at 32 of 64 samples"):
                load_average(tmp_path / "large", parameters, recipe)
    load_average(tmp_path / "large", parameters, recipe)
    assert torch.equal(parameters["a"].detach(), training.average["a"])


def test_what_other_networks_encoded_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.zeros((3, 2)))
    torch.manual_seed(0)
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for _ in range(2):
        require_same(tmp_path, 3, fingerprint(one, 64))
    for count, made_by, words in (
        (3, fingerprint(other, 64), "other networks"),
        (3, fingerprint(one, 128), "other networks"),
        (4, fingerprint(one, 64), "3 encoded pictures"),
    ):
        with pytest.raises(UsoflowError, match=words):
            require_same(tmp_path, count, made_by)


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(samples=64, batch=8, rate=1e-3)
    begun = torch.nn.Parameter(torch.zeros(2))
    training = Training({"a": begun}, recipe, tmp_path)
    training.step(lambda done: begun.sum())
    training.save()
    for other in ({"b": torch.zeros(2)}, {"a": torch.zeros(3)}):
        parameters = {name: torch.nn.Parameter(value) for name, value in other.items()}
        with pytest.raises(UsoflowError, match="damaged or of other settings"):
            Training(parameters, recipe, tmp_path).resume()
    same = {"a": torch.nn.Parameter(torch.zeros(2))}
    longer = dataclasses.replace(recipe, samples=640, rate=1e-2, steady=0.1)
    assert Training(same, longer, tmp_path).resume()
    for changed, made_with, words in (
        (dataclasses.replace(recipe, batch=16), "", "of other settings: batch"),
        (dataclasses.replace(recipe, seed=1), "", "of other settings: seed"),
        (recipe, "other weights", "of other settings: frozen weights"),
    ):
        with pytest.raises(UsoflowError, match=words):
            Training(same, changed, tmp_path, made_with=made_with).resume()
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(UsoflowError, match="damaged or of other settings"):
        Training(same, recipe, tmp_path).resume()


def test_a_run_goes_on_with_the_decay_that_is_asked_for(tmp_path: Path) -> None:
    parameters = {"hidden": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    training = Training(parameters, recipe(decay=0.01), tmp_path)
    training.step(lambda done: sum(p.sum() for p in parameters.values()))
    training.save()
    again = Training(parameters, recipe(decay=0.5), tmp_path)
    assert again.resume()
    groups = [group for optimiser in again.optimisers.all for group in optimiser.param_groups]
    decays = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.5}


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """A gradient was none, and no later loss has told it yet."""
    parameter = torch.nn.Parameter(torch.ones(2))
    training = Training({"a": parameter}, recipe(), tmp_path)
    training.step(lambda done: parameter.sum())
    training.save()
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    training.step(lambda done: parameter.sum())
    with pytest.raises(UsoflowError, match="not finite after 8 samples; they are not saved") as error:
        training.save()
    assert error.value.code == "non_finite"
    fresh = torch.nn.Parameter(torch.zeros(2))
    assert Training({"a": fresh}, recipe(), tmp_path).resume()
    assert bool(fresh.isfinite().all())


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of a sparse file would end the process with a signal."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(UsoflowError, match="No space left") as error:
        encoded(pictures, lambda part: part, tmp_path / "a.npy", CPU)
    assert error.value.code == "output_unwritable"
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"

    def cut_short() -> None:
        with whole(path) as partial:
            partial.write_text('["a", ')
            raise OSError("no space left on device")

    with pytest.raises(UsoflowError, match="no space"):
        cut_short()
    assert list(tmp_path.iterdir()) == []
    with whole(path) as partial:
        partial.write_text("[]")
    assert [found.name for found in tmp_path.iterdir()] == ["captions.json"]


def test_pictures_are_encoded_in_parts_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    monkeypatch.setattr("usoflow.training.latents.PIXELS", 2 * 64)  # two pictures
    encoded(pictures, lambda part: part.mean(dim=(1, 2)), tmp_path / "a.npy", CPU)
    got = np.load(tmp_path / "a.npy")
    assert got.dtype == np.float16
    assert got == pytest.approx((pictures / 255).mean(axis=(1, 2)), abs=1e-3)


def test_noise_follows_the_seed_and_the_sample() -> None:
    """Of a number of more than 32 bits torch's generator for the CPU takes the last 32."""
    drawn = [
        torch.randn(4, generator=random_numbers(CPU, seed, done)).tolist()
        for seed, done in ((1, 0), (2, 0), (1, 32), (1, 0))
    ]
    assert drawn[0] == drawn[3]
    assert len({tuple(values) for values in drawn}) == 3


def test_a_full_disk_is_told_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of torch's writer and of safetensors', which are no OSError."""

    def full(error: Exception) -> Callable[..., None]:
        def write(_: object, path: Path, **more: object) -> None:
            path.write_bytes(b"half")
            raise error

        return write

    words = "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"
    monkeypatch.setattr(torch, "save", full(RuntimeError(words)))
    monkeypatch.setattr(kept, "save_file", full(SafetensorError("I/O error: No space left on device")))
    for write, said in ((states.write_state, "PytorchStreamWriter"), (kept.write_tensors, "No space left")):
        with pytest.raises(UsoflowError, match=said) as error:
            write(tmp_path / "state", {"a": torch.zeros(1)})
        assert error.value.code == "output_unwritable"
    assert list(tmp_path.iterdir()) == []


def test_want_of_memory_is_no_damage(tmp_path: Path) -> None:
    states.write_state(tmp_path / "state.pt", {"done": 1})
    with (
        pytest.raises(UsoflowError) as error,
        loop.want_of_memory_told("Take less."),
        states.read_state(tmp_path / "state.pt"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words.")
    assert (error.value.code, error.value.remedy) == ("out_of_memory", "Take less.")
    assert error.value.detail == "CUDA out of memory. Tried to allocate 2 GiB."

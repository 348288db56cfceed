"""Pocket USO's training: lessons say what they show, each stage trains its own part, files load as usual."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from discs import WORLD, paint_sprites
from usoflow.models.checkpoint import SCALE, TensorFile
from usoflow.models.flux import Flux
from usoflow.models.loading import load_flux, load_projector, load_siglip
from usoflow.models.lora import attach
from usoflow.models.style_projector import LEVELS
from usoflow.models.vision import SiglipVision
from usoflow.models.weights import Linear
from usoflow.training import autoencoder, package
from usoflow.training.autoencoder import VaeStage
from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.base import GUIDANCE, PREFIXES, BaseStage, Batches, Pocket
from usoflow.training.captions import CaptionTokenizer, Vocabulary
from usoflow.training.content import (
    MARGIN,
    SEEN_SIDE,
    ContentEncoder,
    ContentReward,
    Subjects,
    content_scene,
    cut_out,
    train_content_encoder,
    wrong_by,
)
from usoflow.training.drawings import Sprites
from usoflow.training.initial import initialise
from usoflow.training.latents import LatentSet
from usoflow.training.lessons import Batch, Lessons
from usoflow.training.looks import CHANGES
from usoflow.training.loop import Recipe, Training
from usoflow.training.lora import add_lora, extract, lora_parameters
from usoflow.training.painting import paint
from usoflow.training.redraw import Pool, Redrawing, RedrawStage
from usoflow.training.reward import RewardStage, StyleEncoder, StyleReward
from usoflow.training.scenes import pictures_of, style_words
from usoflow.training.tower import (
    Captioned,
    Contrast,
    TowerStage,
    captions_of,
    new_contrast,
    tower_scene,
)
from usoflow.training.triplets import (
    TOKEN,
    USES,
    Encoders,
    Use,
    cache_triplets,
    draw_triplet,
    lesson_cast,
    style_states,
)
from usoflow.training.uso import TOLD_STYLE, RewardedStage, Teaching, UsoStage, new_projector
from usoflow.training.world import World

WHOLE = World.load()
RECIPE = Recipe(samples=400, batch=4, rate=3e-3, warmup=0, save_every=1000)
TOWER = TowerStage(RECIPE, dim=64, mlp_dim=48)
STAGE = UsoStage(RECIPE, RECIPE, lessons=8, style_tokens=2, rank=4, wide_rank=8, reward_batch=2)
SIZES = {"hidden": 64, "double": 1, "single": 1, "text_dim": 32, "text_layers": 1, "clip_dim": 32}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Sprites:
    folder = tmp_path_factory.mktemp("sprites")
    paint_sprites(folder)
    return Sprites(WORLD, folder)


@pytest.fixture(scope="module")
def teaching(sprites: Sprites, tmp_path_factory: pytest.TempPathFactory) -> Teaching:
    folder = tmp_path_factory.mktemp("lessons")
    vae = autoencoder.new_autoencoder(VaeStage(RECIPE, widths=(8, 8, 8, 16)))
    tower = contrast_of(sprites).tower
    encoders = Encoders(vae, tower, sprites, side=64)
    sets = {
        use: cache_triplets(encoders, folder / use, cast=lesson_cast(WORLD, use), use=use, seed=51, count=8)
        for use in USES
    }
    texts = [text for found in sets.values() for text in (*found.prompts, *found.styles, ",", "")]
    tokenizer = CaptionTokenizer(24, 32)
    words = Vocabulary.of(tokenizer.t5(texts)), Vocabulary.of(tokenizer.clip(texts))
    pocket = Pocket(BaseStage(RECIPE, RECIPE, RECIPE, **SIZES), *words)
    initialise(pocket.flux, torch.Generator().manual_seed(0))  # as if trained: its gates are open
    round_as_stored(pocket.flux, PREFIXES["flux"], package.BLOCK_MATRICES)
    pocket.requires_grad_(False)
    projector = new_projector(STAGE, TOWER.grid**2, TOWER.dim, 64)
    return Teaching(pocket, projector, Lessons.of(sets, pocket.stage.tokenizer), STAGE, torch.float32)


def contrast_of(sprites: Sprites) -> Contrast:
    return new_contrast(sprites.world, TOWER)


@pytest.mark.parametrize("use", USES)
def test_a_lesson_shows_what_its_use_says(use: Use) -> None:
    held_out = WORLD.held_out
    for index in range(200):
        lesson = draw_triplet(lesson_cast(WHOLE, use), 3, index, use)
        subject, source = (
            lesson.target.placed[0].subject,
            lesson.content if use == "subject" else lesson.style,
        )
        assert subject == lesson.content.placed[0].subject != lesson.style.placed[0].subject
        if use == "both" and (lesson.style.rendering or lesson.style.look is not None):
            source = dataclasses.replace(source, drawing_set=lesson.content.drawing_set)
        assert lesson.target.drawing_set == source.drawing_set
        assert lesson.target.rendering == source.rendering
        assert lesson.target.look == source.look
        for scene in (lesson.content, lesson.style, lesson.target):
            assert not {scene.placed[0].subject, scene.drawing_set, scene.rendering} & held_out
        if use in ("style", "text"):
            assert subject in WORLD.core
        if lesson.prompt:
            assert subject.replace("-", " ") in lesson.prompt
            assert lesson.prompt.endswith(BACKGROUNDS[lesson.target.background].phrase)


def test_layouts_are_kept_and_shifted() -> None:
    cast = lesson_cast(WORLD, "both")
    lessons = [draw_triplet(cast, 3, i, "both") for i in range(400)]
    kept = [
        t.target.placed == t.content.placed and t.target.background == t.content.background for t in lessons
    ]
    assert 0.25 < np.mean(kept) < 0.5
    assert all(lesson.prompt or same for lesson, same in zip(lessons, kept, strict=True))
    told = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
    for lesson in lessons:
        before, after = lesson.content.placed[0], lesson.target.placed[0]
        if after.side == before.side and after != before:  # shifted
            (words,) = [words for words in told if words in lesson.prompt]
            moved = (after.x - before.x, after.y - before.y)
            assert moved == pytest.approx([TOKEN * step for step in told[words]])


def test_encoded_lessons_are_the_scenes(teaching: Teaching, sprites: Sprites) -> None:
    lessons = teaching.lessons.sets["both"]
    assert lessons.rows("content", np.arange(8)).shape == (8, 16, 8, 8)
    states = lessons.states(np.arange(3))
    assert tuple(states) == tuple(LEVELS.values())
    assert all(state.shape == (3, 64, TOWER.dim) for state in states.values())
    cast = lesson_cast(WORLD, "both")
    assert lessons.prompts == [draw_triplet(cast, 51, i, "both").prompt for i in range(8)]


def test_a_picture_has_a_caption_of_its_content_and_one_of_its_style() -> None:
    scenes = [tower_scene(WHOLE, i) for i in range(60)]
    looked = [scene for scene in scenes if scene.look is not None]
    assert 0 < len(looked) < len(scenes)
    for scene in scenes:
        content, style = captions_of(WHOLE, scene)
        named, *parts = style.split(", ")
        assert named == style_words(WHOLE, scene)
        assert named not in content
        assert bool(parts) == (scene.look is not None)
        assert set(parts) <= set(CHANGES)


def test_contrast_pulls_a_batch_together(sprites: Sprites, tmp_path: Path) -> None:
    contrast = contrast_of(sprites)
    training = Training(dict(contrast.named_parameters()), RECIPE, tmp_path)
    scenes = [tower_scene(WORLD, i) for i in range(8)]
    paint(sprites, scenes[:2], 32, tmp_path / "drawn.npy")  # what a run of other settings left is drawn anew
    captioned = Captioned.of(scenes, paint(sprites, scenes, 64, tmp_path / "drawn.npy"), contrast, WORLD)
    losses = [training.step(lambda _: captioned.loss(contrast, RECIPE, 0)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_no_more_processes_draw_than_cores_may_be_used(
    sprites: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, _context: object) -> None:
            begun.append(workers)
            super().__init__(workers)

    monkeypatch.setattr("usoflow.training.painting.ProcessPoolExecutor", Pool)
    monkeypatch.setattr("usoflow.training.painting.CHUNK", 1)
    scenes = [tower_scene(WORLD, i) for i in range(3)]
    for cores in ({0}, {0, 3}):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        paint(sprites, scenes, 32, tmp_path / f"drawn-{len(cores)}.npy")
    assert begun == [1, 2]


def test_style_alignment_trains_the_projector_alone(teaching: Teaching, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in teaching.base.named_parameters()}
    flow = teaching.flow_loss((("style", 1.0),), RECIPE)
    training = Training(dict(teaching.projector.named_parameters()), RECIPE, tmp_path)
    losses = [training.step(lambda _: flow(0)) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], p) for name, p in teaching.base.named_parameters())


def test_lora_begins_as_nothing_and_its_file_computes_the_same(teaching: Teaching, tmp_path: Path) -> None:
    flow = teaching.flow_loss((("subject", 0.5), ("both", 0.5)), RECIPE)
    before = flow(0).item()
    parameters = lora_parameters(add_lora(teaching.base.flux, 4, 8, seed=1))
    assert flow(0).item() == pytest.approx(before, rel=1e-5)
    training = Training(parameters, RECIPE, tmp_path / "state")
    losses = [training.step(lambda _: flow(0)) for _ in range(40)]
    assert losses[-1] < losses[0]

    assert all(p.any() for p in parameters.values())
    tower = written(teaching, tmp_path, parameters)
    plain = load_flux(TensorFile.open(tower / "base.safetensors").components()["flux"])
    lora = TensorFile.open(tower / package.USO_FILES["loras"]).components()["uso_lora"]
    attach(plain, lora, 1.0)
    lesson = teaching.lessons.sets["subject"]
    x, content = (lesson.rows(name, np.arange(1)) for name in ("target", "content"))
    text = teaching.base.encode_texts(["a cat"])
    asked = {"guidance": 1.0, "references": [content], "method": "uxo"}
    got = plain(x, torch.tensor([0.5]), plain.prepare(*text, (8, 8), **asked))
    wanted = teaching.base.velocity(
        x, torch.tensor([0.5]), text, guidance=1.0, dtype=torch.float32, references=[content]
    )
    assert torch.allclose(got, wanted, atol=2e-2)
    assert not torch.allclose(got, plain(x, torch.tensor([0.5]), plain.prepare(*text, (8, 8))), atol=2e-2)
    without_branches(teaching.base.flux)


def test_of_full_rank_a_lora_begins_as_all_that_the_expert_learnt(teaching: Teaching) -> None:
    flux, expert = teaching.base.flux, copy.deepcopy(teaching.base.flux)
    generator = torch.Generator().manual_seed(3)
    for name, layer in expert.named_modules():
        if isinstance(layer, Linear) and "_blocks." in name:
            layer.weight.add_(0.02 * torch.randn(layer.shape, generator=generator))
    asked = {"guidance": 1.0, "references": [torch.randn(1, 16, 8, 8, generator=generator)]}
    x, text = torch.randn(1, 16, 8, 8, generator=generator), teaching.base.encode_texts(["a cat"])

    def answer(flux: Flux) -> Tensor:
        return flux(x, torch.tensor([0.5]), flux.prepare(*text, (8, 8), **asked))

    apart = {}
    for rank in (8, 256):
        extract(add_lora(flux, rank, 4 * rank, seed=1), flux, expert)
        apart[rank] = (answer(flux) - answer(expert)).abs().max()
        without_branches(flux)
    assert apart[256] < 1e-4 < 0.9 * apart[8] < 0.9 * (answer(flux) - answer(expert)).abs().max()


def test_of_narrow_ranks_alone_a_lora_has_bytedances_names(teaching: Teaching) -> None:
    names = lora_parameters(add_lora(teaching.base.flux, 4, 0, seed=1))
    without_branches(teaching.base.flux)
    assert len(names) == 2 * (4 + 2)
    assert all(".processor." in name for name in names)


def without_branches(flux: Flux) -> None:
    """Take off what a test has added: the fixture is shared."""
    for layer in flux.modules():
        if isinstance(layer, Linear):
            layer.branches = torch.nn.ModuleList()


def test_guidance_is_where_the_answer_comes_to_rest(teaching: Teaching) -> None:
    """Without the plain base nothing is added; with it, u + s (v - u) is its own target."""
    strength = 2.5
    guided = dataclasses.replace(
        teaching, plain=teaching.base, stage=dataclasses.replace(STAGE, guidance=strength)
    )
    batch = teaching.lessons.first("both", 4)
    x, sigma = torch.randn(4, 16, 8, 8), torch.full((4,), 0.5)
    straight = torch.randn(x.shape)
    assert torch.equal(teaching.target(batch, x, sigma, straight, torch.randn(x.shape)), straight)
    text = teaching.base.encode_texts(["", "", "", ""])
    plain = teaching.base.velocity(x, sigma, text, guidance=1.0, dtype=torch.float32)
    rest = plain + strength * (straight - plain)
    assert torch.allclose(guided.target(batch, x, sigma, straight, rest), rest, atol=1e-4)
    assert not torch.allclose(guided.target(batch, x, sigma, straight, straight), straight, atol=0.1)


def test_words_alone_are_answered_as_the_plain_base_does(teaching: Teaching) -> None:
    guided = dataclasses.replace(teaching, plain=teaching.base)
    batch = teaching.lessons.first("text", 4)
    x, sigma = torch.randn(4, 16, 8, 8), torch.full((4,), 0.5)
    wanted = teaching.velocity(batch, x, sigma, guidance=GUIDANCE)
    got = guided.target(batch, x, sigma, torch.zeros_like(x), torch.zeros_like(x))
    assert torch.allclose(got, wanted, atol=1e-5)
    assert wanted.abs().mean() > 0.01


def test_a_style_with_a_name_is_answered_as_by_the_plain_base_that_is_told_it(teaching: Teaching) -> None:
    guided = dataclasses.replace(teaching, plain=teaching.base)
    batch, prompts, told = named_lessons(teaching, "style")
    x, sigma = torch.randn(4, 16, 8, 8), torch.full((4,), 0.5)
    named, unnamed = (
        teaching.base.velocity(
            x, sigma, teaching.base.encode_texts(texts), guidance=GUIDANCE, dtype=torch.float32
        )
        for texts in (told, prompts)
    )
    got = guided.target(batch, x, sigma, torch.zeros_like(x), torch.zeros_like(x))
    assert torch.allclose(got, named + TOLD_STYLE * (named - unnamed), atol=1e-4)
    assert (named - unnamed).abs().mean() > 1e-3


def test_a_content_picture_is_answered_as_by_the_expert_that_is_told_the_style(
    teaching: Teaching,
) -> None:
    taught = dataclasses.replace(teaching, plain=teaching.base, expert=teaching.base)
    batch, _, told = named_lessons(teaching, "both")
    x, sigma = torch.randn(4, 16, 8, 8), torch.full((4,), 0.5)
    content = teaching.lessons.sets["both"].rows("content", batch.indices)
    wanted = teaching.base.velocity(
        x, sigma, teaching.base.encode_texts(told), guidance=GUIDANCE, dtype=torch.float32,
        references=[content], method="offset",
    )  # fmt: skip
    silence = torch.zeros_like(x)
    assert torch.allclose(taught.target(batch, x, sigma, silence, silence), wanted, atol=1e-4)
    alone = dataclasses.replace(taught, expert=None)
    assert not torch.allclose(alone.target(batch, x, sigma, silence, silence), wanted, atol=1e-2)


def named_lessons(teaching: Teaching, use: Use) -> tuple[Batch, list[str], list[str]]:
    """Four lessons whose style has a name, their prompts, and the same with the name."""
    lessons = teaching.lessons
    batch = lessons.with_name(use, np.arange(4) % len(lessons.named[use]))
    scenes = [draw_triplet(lesson_cast(WORLD, use), 51, int(i), use).target for i in batch.indices]
    assert all(scene.look is None for scene in scenes)
    prompts = [lessons.sets[use].prompts[i] for i in batch.indices]
    names = [style_words(WORLD, scene) for scene in scenes]
    told = [f"{text}, {name}" if text else name for text, name in zip(prompts, names, strict=True)]
    return batch, prompts, told


@pytest.mark.parametrize("use", ["subject", "style", "both"])
def test_some_batches_with_pictures_are_of_what_words_tell(teaching: Teaching, use: Use) -> None:
    lessons = teaching.lessons
    batches = [lessons.choose(((use, 1.0),), np.random.default_rng(i), 4, told=0.6) for i in range(40)]
    assert 0.3 < np.mean([batch.told is not None for batch in batches]) < 0.9


def test_an_expert_learns_to_redraw_and_keeps_its_words(teaching: Teaching, tmp_path: Path) -> None:
    plain, sets = teaching.base, teaching.lessons.sets
    expert = Pocket(plain.stage, plain.t5_words, plain.clip_words)
    expert.load_state_dict(plain.state_dict())
    tokenizer = plain.stage.tokenizer
    kept, changed = Pool.kept(sets["subject"], tokenizer), Pool.changed(sets["both"], tokenizer)
    named = sets["both"].named
    assert (len(kept.rows), len(changed.rows)) == (8, len(named))
    target, content = changed.pictures(np.asarray([0, 1]))
    assert torch.equal(target, sets["both"].rows("target", named[:2]))
    assert torch.equal(content, sets["both"].rows("content", named[:2]))
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    shutil.copy(sets["text"].folder / "target.npy", scenes / "latents.npy")
    shutil.copy(sets["text"].folder / "prompts.json", scenes / "captions.json")
    words = Batches.of(LatentSet(scenes, seed=1), plain.stage)

    def losses_of(stage: RedrawStage) -> list[Tensor]:
        redrawing = Redrawing(expert, plain, words, kept, changed, stage, torch.float32)
        training = Training(dict(expert.named_parameters()), RECIPE, tmp_path)
        assert redrawing.sample(np.arange(2), seed=0).shape == (2, 16, 8, 8)
        return [training.step(lambda _: redrawing.loss(0)) for _ in range(40)]

    only_words = RedrawStage(RECIPE, words=1.0, changed=0.0)
    assert losses_of(only_words)[0] < 1e-9  # nothing is to be learnt of what it knows
    redrawn = losses_of(RedrawStage(RECIPE, words=0.0, changed=1.0))
    assert redrawn[-1] < 0.7 * redrawn[0]
    forgot = losses_of(only_words)
    assert forgot[-1] < 0.5 * forgot[0]


def written(teaching: Teaching, folder: Path, lora: dict[str, torch.nn.Parameter]) -> Path:
    """Write all files; the base as a checkpoint of its own."""
    vae = autoencoder.new_autoencoder(VaeStage(RECIPE, widths=(8, 8, 8, 16)))
    package.write(folder / "base.safetensors", teaching.base, vae)
    package.write_uso(folder, new_tower(), teaching.projector, lora)
    return folder


def test_narrow_matrices_are_stored_with_their_scale() -> None:
    values = {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64), "a.bias": torch.randn(64)}
    held = package.stored(values, re.compile(r"a\.weight"))
    assert {name: value.dtype for name, value in held.items()} == {
        "a.weight": torch.float8_e4m3fn,
        "a.scale_weight": torch.float32,
        "b.weight": torch.float16,
        "a.bias": torch.float16,
    }
    again = held["a.weight"].float() * held["a.scale_weight"]
    assert torch.allclose(again, values["a.weight"], rtol=2**-4, atol=1e-3)


def round_as_stored(module: torch.nn.Module, prefix: str, narrow: re.Pattern[str]) -> None:
    """Give the matrices that a file holds in fp8 the values that it holds: what is read computes the same."""
    held = package.stored({prefix + name: p for name, p in module.named_parameters()}, narrow)
    for name, parameter in module.named_parameters():
        if narrow.fullmatch(prefix + name):
            scale = held[f"{prefix + name.rpartition('.')[0]}.{SCALE}"]
            parameter.data = held[prefix + name].float() * scale


def new_tower() -> SiglipVision:
    tower = Contrast(TOWER, Vocabulary((0, 1))).tower
    round_as_stored(tower, "vision_model.", package.TOWER_MATRICES)
    return tower


def test_files_load_and_compute_as_the_modules(teaching: Teaching, tmp_path: Path) -> None:
    written(teaching, tmp_path, {})
    tower = new_tower()
    pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    wanted = style_states(tower, pictures)
    parts = [TensorFile.open(tmp_path / name).components() for name in package.USO_FILES.values()][:2]
    vision, projector = load_siglip(parts[0]["siglip"]), load_projector(parts[1]["uso_projector"])
    got = style_states(vision, pictures)
    assert (got - wanted).norm() < 2e-2 * wanted.norm()  # fp16 has what is set nearly
    states = dict(zip(LEVELS.values(), wanted.unbind(1), strict=True))
    assert torch.allclose(projector(states), teaching.projector(states), atol=2e-2)
    assert "vision_model.embeddings.patch_embedding.weight" in load_file(
        tmp_path / package.USO_FILES["clip_vision"]
    )


def test_reward_is_least_for_the_style_picture_itself_and_flows_back(teaching: Teaching) -> None:
    torch.manual_seed(0)
    vae = autoencoder.new_autoencoder(VaeStage(RECIPE, widths=(8, 8, 8, 16))).requires_grad_(False)
    reward = StyleReward(StyleEncoder(5).requires_grad_(False), vae, torch.float32, side=128)
    latents = torch.randn(2, 16, 8, 8, requires_grad=True)
    with torch.no_grad():
        own = (vae.decoder(latents / 0.3611 + 0.1159).permute(0, 2, 3, 1) + 1).div(2).clamp(0, 1)
    assert reward.loss(latents, own).item() == pytest.approx(0.0, abs=1e-5)
    loss = reward.loss(latents, torch.rand(2, 64, 64, 3))
    loss.backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0

    small = dataclasses.replace(reward, side=48)  # an encoder that has learnt smaller pictures
    assert small.loss(latents, own).item() == pytest.approx(0.0, abs=1e-5)
    assert small.loss(latents, torch.rand(2, 64, 64, 3)).item() != loss.item()

    rewarded = teaching.reward_loss((("both", 1.0),), RECIPE, reward)
    teaching.projector.zero_grad()
    rewarded(0).backward()
    assert all(p.grad is not None for p in teaching.projector.parameters())


def content_encoder() -> ContentEncoder:
    torch.manual_seed(0)
    return ContentEncoder(len(WORLD.lesson_subjects))


def test_what_is_cut_out_is_where_the_subject_is() -> None:
    """A square of one colour, wherever it is and however large, fills the middle of what is cut out."""
    pictures, places = torch.zeros(2, 96, 96, 3), torch.tensor([[0.25, 0.5, 0.25], [0.625, 0.375, 0.5]])
    for picture, (x, y, side) in zip(pictures, (96 * places).int().tolist(), strict=True):
        picture[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = 1
    found = cut_out(pictures, places)
    assert found.shape == (2, 3, SEEN_SIDE, SEEN_SIDE)
    inner = round(SEEN_SIDE * (1 - 1 / MARGIN) / 2)
    assert bool((found[..., inner + 2 : -inner - 2, inner + 2 : -inner - 2] == 1).all())
    assert bool((found[..., : inner - 2, :] == 0).all())
    rng = np.random.default_rng(0)
    off = wrong_by(places.repeat(200, 1), rng, 0.1, 0.1) - places.repeat(200, 1)
    assert off[:, :2].std(dim=0).tolist() == pytest.approx([0.04, 0.04], rel=0.2)  # of sides 1/4 and 1/2


def test_the_content_encoder_learns_who_is_shown(sprites: Sprites, tmp_path: Path) -> None:
    recipe = Recipe(samples=480, batch=8, rate=3e-3, warmup=0, save_every=1000)
    encoder = train_content_encoder(sprites, RewardStage(recipe, drawn=12), tmp_path / "content", side=64)
    scenes = [content_scene(WORLD, i) for i in range(12)]
    assert not {placed.subject for scene in scenes for placed in scene.placed} & WORLD.held_out
    pictures = pictures_of(sprites, scenes, 64)
    shown = Subjects.of(WORLD, [scene.placed[0] for scene in scenes])
    with torch.no_grad():
        learnt = F.cross_entropy(encoder(pictures, shown.places), shown.numbers)
        fresh = F.cross_entropy(content_encoder()(pictures, shown.places), shown.numbers)
    assert learnt < 0.8 * fresh


def test_rewards_teach_the_lora_alone(teaching: Teaching, tmp_path: Path) -> None:
    """Both together; of a content picture alone, half of the target is what the model answered before."""
    model, before = copy.deepcopy(teaching), copy.deepcopy(teaching.base)
    lora = lora_parameters(add_lora(model.base.flux, 2, 0, 1))
    model = dataclasses.replace(model, plain=teaching.base, before=before)
    vae = autoencoder.new_autoencoder(VaeStage(RECIPE, widths=(8, 8, 8, 16))).requires_grad_(False)
    style = StyleReward(StyleEncoder(5).requires_grad_(False), vae, torch.float32, side=64)
    shown = {use: Subjects.of_lessons(WORLD, use, 51, 8) for use in ("style", "both", "subject")}
    content = ContentReward(content_encoder().requires_grad_(False), shown)
    for use in shown:
        stage = RewardedStage(RECIPE, ((use, 1.0),), (("subject", 1.0),), 1.0, 0.1, flow_batch=2)
        loss = model.rewarded_loss(stage, style, content)
        loss(0).backward()
        assert all(p.grad is not None for p in lora.values())
        assert all(p.grad is None for p in before.parameters())
    first = model.lessons.first("subject", 2)
    x, sigma = torch.randn(2, 16, 8, 8), torch.full((2,), 0.5)
    straight, got = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    alone = dataclasses.replace(model, before=None).target(first, x, sigma, straight, got)
    known = teaching.velocity(first, x, sigma, guidance=GUIDANCE)
    assert torch.allclose(model.target(first, x, sigma, straight, got), (alone + known) / 2, atol=1e-5)


def test_only_what_is_given_can_be_rewarded() -> None:
    with pytest.raises(ValueError, match="no reward for text"):
        RewardedStage(RECIPE, (("text", 1.0),), (("text", 1.0),), 1.0, 1.0)
    with pytest.raises(ValueError, match="flow_every at least 1"):
        RewardedStage(RECIPE, (("both", 1.0),), (("text", 1.0),), 1.0, 1.0, flow_every=0)

"""The evaluation asks what no training showed, counts rightly, and runs on any model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discs import WHOLE, WORLD, paint_sprites
from usoflow.errors import UsoflowError
from usoflow.models.library import ModelLibrary
from usoflow.models.placement import Placement
from usoflow.settings import find_folders
from usoflow.training import uso_judge
from usoflow.training.backgrounds import BACKGROUNDS
from usoflow.training.drawings import Sprites
from usoflow.training.loop import Recipe
from usoflow.training.scenes import Scene
from usoflow.training.triplets import Triplet
from usoflow.training.uso_evaluate import CELLS, CellName, Contender, Given, components_of, marks, questions
from usoflow.training.uso_judge import (
    UsoJudge,
    Verdict,
    known_subjects,
    layout_of,
    shipped_uso_judge,
    style_name,
    styles_of,
    train_uso_judge,
    write_uso_judge,
)
from usoflow.training.uso_report import evaluate


class Says(nn.Module):
    """A judge that has its mind made up: it sees these scenes, whatever it is shown."""

    def __init__(self, scenes: list[Scene]) -> None:
        super().__init__()
        self.scenes = scenes

    def forward(self, pictures: Tensor) -> Verdict:
        subjects, styles, backgrounds = known_subjects(WHOLE), styles_of(WHOLE), list(BACKGROUNDS)
        seen = (
            ([subjects.index(s.placed[0].subject) for s in self.scenes], len(subjects)),
            ([styles.index(style_name(s)) for s in self.scenes], len(styles)),
            ([backgrounds.index(s.background) for s in self.scenes], len(backgrounds)),
        )
        logits = [nn.functional.one_hot(torch.tensor(which), total).float() for which, total in seen]
        return Verdict(*logits, layout=torch.tensor([layout_of(s) for s in self.scenes]))


def marked(asked: list[Triplet], scenes: list[Scene]) -> dict[str, float]:
    return marks(Says(scenes), WHOLE, asked, torch.zeros(len(asked), 8, 8, 3))  # type: ignore[arg-type]


def test_a_transformer_that_cannot_be_run_is_passed_over(tmp_path: Path, small_models: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(small_models / "checkpoints", checkpoints)
    (usual,) = checkpoints.iterdir()
    tensors = load_file(usual)
    (name,) = (name for name in tensors if name.endswith("img_in.weight"))
    tensors[name] = tensors[name].repeat(1, 2)  # as a tool's, which takes a picture beside the latent
    save_file(tensors, checkpoints / "a-canny.safetensors")
    for left in (usual.name, "a-canny.safetensors"):  # alone it is taken, to be refused by name
        found = components_of(find_folders(models=tmp_path), ["flux"])
        assert found["flux"].file.path.name == left
        usual.unlink(missing_ok=True)


@pytest.mark.parametrize("folder", ["loras", "model_patches"])
def test_of_two_files_of_uso_none_is_chosen_by_its_name(
    tmp_path: Path, small_models: Path, folder: str
) -> None:
    shutil.copytree(small_models, tmp_path / "models")
    (usual,) = (tmp_path / "models" / folder).iterdir()
    again = usual.with_name("a-link.safetensors")
    again.symlink_to(usual)
    assert len(contender(tmp_path / "models").files) == 4  # a file may have two names
    again.unlink()
    shutil.copy(usual, again)
    with pytest.raises(UsoflowError, match="two files") as caught:
        contender(tmp_path / "models")
    assert str(usual) in caught.value.detail
    assert str(again) in caught.value.detail
    assert caught.value.remedy == "Keep one of them in the folder."
    components_of(find_folders(models=tmp_path / "models"), ["flux"])  # which needs neither


@pytest.mark.parametrize("name", CELLS)
def test_questions_are_of_held_out_subjects_and_styles(name: CellName) -> None:
    cell = CELLS[name]
    asked = questions(WHOLE, cell, 100)
    assert asked == questions(WHOLE, cell, 100)
    for question in asked:
        assert question.style.placed[0].subject in WHOLE.gallery
        assert question.content.placed[0].subject in (WHOLE.core if cell.use == "style" else WHOLE.gallery)
        assert (style_name(question.style) in WHOLE.held_out) == cell.held_out_style
        assert question.target.look is None


def test_the_right_picture_is_right_and_the_cheats_are_found_out() -> None:
    asked = questions(WHOLE, CELLS["subject"], 60)
    targets, contents = [t.target for t in asked], [t.content for t in asked]
    found = marked(asked, targets)
    assert found["subject"] == found["style"] == found["background"] == 1
    assert found["leaked"] == 0
    assert found["moved"] > 0.8
    pasted = marked(asked, contents)
    assert pasted["subject"] == 1
    assert pasted["moved"] == pasted["all"] == 0
    assert pasted["background"] < 0.2

    asked = questions(WHOLE, CELLS["style seen"], 60)
    assert marked(asked, [t.target for t in asked])["all"] == 1
    pasted = marked(asked, [t.style for t in asked])
    assert pasted["style"] == pasted["leaked"] == 1
    assert pasted["subject"] < 0.1


@pytest.fixture
def sprites(tmp_path: Path) -> Sprites:
    paint_sprites(tmp_path / "sprites")
    return Sprites(WORLD, tmp_path / "sprites")


@pytest.fixture
def judge() -> UsoJudge:
    torch.manual_seed(0)
    return UsoJudge(WORLD).eval()


def contender(models: Path) -> Contender:
    return Contender.of(find_folders(models=models), ModelLibrary(Placement.choose("cpu", "fp32")), side=64)


def test_every_row_of_every_cell_is_written(
    small_models: Path, sprites: Sprites, judge: UsoJudge, tmp_path: Path
) -> None:
    said: list[str] = []
    tables = evaluate(
        contender(small_models), judge, sprites, count=2, output=tmp_path / "out", say=said.append
    )
    assert list(tables) == list(CELLS)
    wanted = {"whole", "no LoRA", "no projector", "wrong reference", "real target", "reference given back"}
    assert set(tables["both"]) == wanted | {"chance"}
    assert set(tables["subject"]) == wanted - {"no projector"} | {"chance"}
    assert len(said) == 3 + 3 + 3 + 4 + 4
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["both"] == tables["both"]
    assert (tmp_path / "out" / "both-whole.png").exists()
    assert "| real target |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_what_is_left_out_changes_the_pictures(small_models: Path, sprites: Sprites) -> None:
    asked, model = questions(WORLD, CELLS["both"], 2), contender(small_models)
    whole = model.answer(sprites, asked, Given())
    assert whole.shape == (2, 64, 64, 3)
    assert torch.equal(whole, model.answer(sprites, asked, Given()))
    for less in (Given(lora=False), Given(style=False), Given(right_content=False)):
        assert not torch.allclose(whole, model.answer(sprites, asked, less), atol=1e-2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("can't allocate memory")])
def test_what_does_not_fit_is_drawn_in_parts(
    small_models: Path, sprites: Sprites, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked, model = questions(WORLD, CELLS["both"], 5), contender(small_models)
    wanted, at_once = model.answer(sprites, asked, Given()), []
    batch = Contender._batch

    def only_two(self: Contender, sprites: Sprites, asked: list[Triplet], *rest: object) -> Tensor:
        at_once.append(len(asked))
        if len(asked) > 2:
            raise error
        return batch(self, sprites, asked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Contender, "_batch", only_two)
    assert torch.allclose(model.answer(sprites, asked, Given()), wanted, atol=1e-4)
    assert at_once == [5, 2, 3, 1, 2]


def test_the_files_that_are_measured_are_named(small_models: Path) -> None:
    files = contender(small_models).files
    assert len(files) == len(set(files)) == 4
    assert all(file.is_file() for file in files)


def test_a_folder_without_uso_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsoflowError, match="no USO DiT LoRA"):
        contender(tmp_path)


def test_the_judge_learns(sprites: Sprites, tmp_path: Path) -> None:
    recipe = Recipe(samples=160, batch=8, rate=2e-3, warmup=0, save_every=1000)
    judge = train_uso_judge(sprites, recipe, tmp_path / "judge")
    again = uso_judge._loss(judge, sprites, recipe)
    fresh = uso_judge._loss(UsoJudge(WORLD), sprites, recipe)
    with torch.no_grad():
        assert again(0) < fresh(0)


def test_a_judge_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    judge, pictures = UsoJudge(WORLD).eval(), torch.rand(2, 64, 64, 3)
    write_uso_judge(judge, tmp_path)
    monkeypatch.setattr(uso_judge.resources, "files", lambda package: tmp_path)
    wanted, got = judge(pictures), shipped_uso_judge(WORLD)(pictures)
    assert torch.allclose(got.subject, wanted.subject, atol=1e-2)
    assert not torch.allclose(UsoJudge(WORLD)(pictures).subject, wanted.subject, atol=1e-2)


def test_the_shipped_judge_tells_the_backgrounds_of_the_shipped_world() -> None:
    rng = np.random.default_rng(0)
    painted = torch.from_numpy(np.stack([ground.paint(128, rng) for ground in BACKGROUNDS.values()]))
    with torch.inference_mode():
        verdict = shipped_uso_judge(WHOLE)(painted.float().clamp(0, 1))
    right = verdict.background.argmax(dim=1) == torch.arange(len(BACKGROUNDS))
    assert right.float().mean() > 0.8

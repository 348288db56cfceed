"""Which model files the official workflow is given: the tutorial's, else the ones that take their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from usoflow.catalogue import CHECKPOINT, KNOWN_FILES, SplitFiles, name_of, same_kind, split_files
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.settings import POCKET_MODELS, Folders, find_folders

SIDE: Final = 1024  # of a picture by FLUX.1, as the template has it
SUBJECT_SIDE: Final = 512  # likewise


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the loaders of the official workflow are given.

    Attributes:
        names: file by kind of model folder.
        split: files that take the checkpoint's place together; its name is of no use then.
        side: of pictures for which no size is asked: the side that the transformer was trained for.
        notes: what is told of files that take the place of others.
    """

    names: dict[str, str]
    split: SplitFiles | None = None
    side: int = SIDE
    notes: tuple[str, ...] = ()

    @property
    def subject_side(self) -> int:
        """The longer side of subjects' pictures for which none is asked."""
        return min(SUBJECT_SIDE, self.side)


POCKET_NOTE: Final = (
    "The small pocket models are used; they work best at {side}x{side}."
    " `usoflow doctor` tells which of the tutorial's are missing."
)
TUTORIAL: Final = ModelFiles({file.folder: file.name for file in KNOWN_FILES})


def at_hand(folders: Folders) -> ModelFiles:
    """The tutorial's files; where one is missing and one other file holds the same models, that one.

    Instead of the checkpoint, the files of its parts may be there. Where the pocket models' checkpoint draws,
    only they fit it.
    """
    if folders.are_pocket(CHECKPOINT.folder):
        folders = find_folders(models=POCKET_MODELS)
    there = {file: name_of(file, folders) for file in KNOWN_FILES}
    split = None if there[CHECKPOINT] else split_files(folders)
    lacking = [file for file, name in there.items() if name is None and not (split and file is CHECKPOINT)]
    twins = {file: found[0] for file in lacking if len(found := list(same_kind(file, folders))) == 1}
    names = TUTORIAL.names | {file.folder: name for file, name in there.items() if name}
    names |= {file.folder: name for file, name in twins.items()}
    side = _side(folders, *(("diffusion_models", split.transformer) if split else _checkpoint(names)))
    taken = [f"{name} for {file.name}" for file, name in twins.items()]
    if split:
        taken.append(f"{split.transformer}, {split.clip_l}, {split.t5} and {split.vae} for {CHECKPOINT.name}")
    if not taken:
        return ModelFiles(names, side=side)
    if folders.are_pocket(CHECKPOINT.folder):
        return ModelFiles(names, side=side, notes=(POCKET_NOTE.format(side=side),))
    small = f" Its pictures have {side}x{side} pixels." if side != SIDE else ""
    note = f"Not all files of the tutorial are there. Taken: {', '.join(taken)}.{small}"
    return ModelFiles(names, split, side, (note,))


def _checkpoint(names: dict[str, str]) -> tuple[str, str]:
    return CHECKPOINT.folder, names[CHECKPOINT.folder]


def _side(folders: Folders, folder: str, name: str) -> int:
    try:
        transformer = TensorFile.open(folders.model(folder, name)).component("flux")
        return transformer.setting("side", SIDE)
    except UsoflowError:  # whoever loads it will say what is wrong
        return SIDE

"""Which model files the official workflow is given: the tutorial's, else the ones that take their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from usoflow.catalogue import KNOWN_FILES, missing, same_kind
from usoflow.errors import UsoflowError
from usoflow.models.checkpoint import TensorFile
from usoflow.settings import Folders

SIDE: Final = 1024  # of a picture by FLUX.1, as the template has it
SUBJECT_SIDE: Final = 512  # likewise


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the loaders of the official workflow are given.

    Attributes:
        names: file by kind of model folder.
        side: of pictures for which no size is asked: the side that the transformer was trained for.
        notes: what is told of files that take the place of others.
    """

    names: dict[str, str]
    side: int = SIDE
    notes: tuple[str, ...] = ()

    @property
    def subject_side(self) -> int:
        """The longer side of subjects' pictures for which none is asked."""
        return min(SUBJECT_SIDE, self.side)


TUTORIAL: Final = ModelFiles({file.folder: file.name for file in KNOWN_FILES})


def at_hand(folders: Folders) -> ModelFiles:
    """The tutorial's files; where one is missing and one other file holds the same models, that one."""
    twins = {file: found[0] for file in missing(folders) if len(found := list(same_kind(file, folders))) == 1}
    names = TUTORIAL.names | {file.folder: name for file, name in twins.items()}
    side = _side(folders, names["checkpoints"])
    if not twins:
        return ModelFiles(names, side)
    taken = ", ".join(f"{name} for {file.name}" for file, name in twins.items())
    small = f" Its pictures have {side}x{side} pixels." if side != SIDE else ""
    return ModelFiles(names, side, (f"Not all files of the tutorial are there. Taken: {taken}.{small}",))


def _side(folders: Folders, checkpoint: str) -> int:
    try:
        transformer = TensorFile.open(folders.model("checkpoints", checkpoint)).component("flux")
        return transformer.setting("side", SIDE)
    except UsoflowError:  # whoever loads it will say what is wrong
        return SIDE

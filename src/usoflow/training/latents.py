"""The latents of many scenes, computed once and kept on disk: what the base is trained on.

`cache` encodes the scenes of a seed with the trained VAE; `LatentSet` gives batches by number.
`encoded_scenes`, `encoded` and `held` serve the lessons of Pocket USO (`triplets`) too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from usoflow.errors import UsoflowError
from usoflow.models.latent_format import LatentFormat
from usoflow.models.vae import AutoEncoder
from usoflow.training.autoencoder import encode
from usoflow.training.captions import CaptionTokenizer, Ids
from usoflow.training.drawings import Sprites
from usoflow.training.kept import fingerprint, new_array, whole
from usoflow.training.loop import CPU
from usoflow.training.painting import Pictures, painted
from usoflow.training.scenes import Scene, caption, draw_taught_scene

PIXELS = 1 << 22  # that are encoded at once
MADE_BY = "made-by.txt"  # in a cache's folder: the `fingerprint` of what encoded it


@dataclass(frozen=True)
class LatentSet:
    """Model latents (after scale and shift) and captions of scenes 0 to `count` of one seed.

    Attributes:
        folder: of `latents.npy` (float16 [N, 16, h, w]) and `captions.json`.
        seed: of the order in which scenes are visited.
        device: where batches are given; on a GPU all latents are held there.
    """

    folder: Path
    seed: int
    device: torch.device = CPU

    @functools.cached_property
    def latents(self) -> Tensor:
        return held(self.folder / "latents.npy", self.device)

    @property
    def side(self) -> int:
        """Of the pictures."""
        return 8 * int(self.latents.shape[-1])

    @functools.cached_property
    def captions(self) -> list[str]:
        texts: list[str] = json.loads((self.folder / "captions.json").read_text("utf-8"))
        return texts

    def indices(self, done: int, count: int) -> npt.NDArray[np.int64]:
        """Which scenes samples `done` to `done + count` are: each epoch is a new permutation of all."""
        total = len(self.captions)
        wanted = np.arange(done, done + count)
        orders = {int(epoch): _order(self.seed, int(epoch), total) for epoch in np.unique(wanted // total)}
        return np.asarray([orders[int(n // total)][n % total] for n in wanted])

    def batch(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """float32 [B, 16, h, w]."""
        return self.latents[torch.from_numpy(indices).to(self.device)].float()

    def ids(self, tokenizer: CaptionTokenizer) -> tuple[Ids, Ids]:
        """T5 and CLIP ids of all captions."""
        return tokenizer(self.captions)


def encoded(
    pictures: Pictures, network: Callable[[Tensor], Tensor], path: Path, device: torch.device
) -> None:
    """Write what a network makes of many pictures, as float16; it is given float32 [B, S, S, 3] in 0..1."""
    stored, first = None, 0
    with whole(path) as partial:
        for part in torch.from_numpy(pictures).split(max(PIXELS // pictures.shape[1] ** 2, 1)):
            made = network(part.to(device).float() / 255).half().cpu().numpy()
            if stored is None:  # no more than a part is ever held
                shape = (len(pictures), *made.shape[1:])
                stored = new_array(partial, np.float16, shape)
            stored[first : first + len(made)] = made
            first += len(made)
        del stored  # written


@functools.lru_cache(maxsize=32)
def held(path: Path, device: torch.device) -> Tensor:
    """The array of a file; on a CPU it is mapped."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).to(device)


def encoded_scenes(
    module: AutoEncoder,
    sprites: Sprites,
    scenes: Sequence[Scene],
    side: int,
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Write the model latents of scenes, [N, 16, h, w]; what is drawn for that does not stay."""

    def network(pictures: Tensor) -> Tensor:
        return LatentFormat().to_model(encode(module, pictures, dtype=dtype))

    with painted(sprites, scenes, side, path.with_suffix(".drawn.npy")) as pictures:
        encoded(pictures, network, path, device)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(total)


def cache(
    module: AutoEncoder,
    sprites: Sprites,
    folder: Path,
    *,
    seed: int,
    side: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> LatentSet:
    """Encode scenes 0 to `count` of `seed` at `side` pixels, unless they are there.

    Raises:
        UsoflowError: "training_config" if there are more or fewer, or of other networks or settings;
            "output_unwritable".
    """
    if not (folder / "captions.json").exists():  # it is written last
        folder.mkdir(parents=True, exist_ok=True)
        scenes = [draw_taught_scene(sprites.world, seed, i) for i in range(count)]
        encoded_scenes(module, sprites, scenes, side, folder / "latents.npy", dtype=dtype, device=device)
        texts = [caption(sprites.world, scene) for scene in scenes]
        with whole(folder / "captions.json") as partial:
            partial.write_text(json.dumps(texts), "utf-8")
    found = LatentSet(folder, seed, device)
    require_same(folder, count, fingerprint(module, seed, side, str(dtype)))
    return found


def require_same(folder: Path, wanted: int, made_by: str) -> None:
    """What was encoded before must be as many as are asked for now, and of the same networks.

    Args:
        folder: of a cache; what it does not say yet of where it comes from is noted.
        wanted: how many.
        made_by: their `fingerprint`.

    Raises:
        UsoflowError: "training_config".
    """
    note = folder / MADE_BY
    if not note.exists():
        with whole(note) as partial:
            partial.write_text(made_by, "utf-8")
    if note.read_text("utf-8") != made_by:
        raise UsoflowError(
            "training_config",
            f"{folder} was encoded by other networks, or with other settings.",
            remedy="Move it away to have its pictures encoded anew, and what was learnt from it too.",
        )
    lengths = {len(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}
    if lengths != {wanted}:
        raise UsoflowError(
            "training_config",
            f"{folder} has {' and '.join(map(str, sorted(lengths)))} encoded pictures, not {wanted}.",
            remedy="Go on with as many as it was begun with, or move it away to have them encoded anew.",
        )

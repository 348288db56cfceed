"""The latents of many scenes, computed once and kept on disk: what the base is trained on.

`cache` encodes the scenes of a seed with the trained VAE; `LatentSet` gives batches by number. The cache can
be interrupted: it continues at the first scene that is not there.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from usoflow.models.vae import AutoEncoder, LatentFormat
from usoflow.training.autoencoder import encode
from usoflow.training.captions import CaptionTokenizer, Ids
from usoflow.training.drawings import Sprites
from usoflow.training.scenes import caption, draw_taught_scene, pictures_of

CHUNK = 64


@dataclass(frozen=True)
class LatentSet:
    """Model latents (after scale and shift) and captions of scenes 0 to `count` of one seed.

    Attributes:
        folder: of `latents.npy` (float16 [N, 16, h, w]) and `captions.json`.
        seed: of the order in which scenes are visited.
    """

    folder: Path
    seed: int

    @functools.cached_property
    def latents(self) -> npt.NDArray[np.float16]:
        stored: npt.NDArray[np.float16] = np.load(self.folder / "latents.npy", mmap_mode="r")
        return stored

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
        return torch.from_numpy(self.latents[indices].astype(np.float32))

    def ids(self, tokenizer: CaptionTokenizer) -> tuple[Ids, Ids]:
        """T5 and CLIP ids of all captions."""
        return tokenizer(self.captions)


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
) -> LatentSet:
    """Encode scenes 0 to `count` of `seed` at `side` pixels, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    path, progress = folder / "latents.npy", folder / "progress.json"
    done = json.loads(progress.read_text())["done"] if progress.exists() else 0
    shape = (count, 16, side // 8, side // 8)
    mode = "r+" if path.exists() and done else "w+"
    stored = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
    for start in range(done, count, CHUNK):
        stop = min(start + CHUNK, count)
        scenes = [draw_taught_scene(sprites.world, seed, i) for i in range(start, stop)]
        images = pictures_of(sprites, scenes, side)
        stored[start:stop] = (
            LatentFormat().to_model(encode(module, images, dtype=dtype)).numpy().astype(np.float16)
        )
        if start % (CHUNK * 50) == 0 or stop == count:
            stored.flush()
            progress.write_text(json.dumps({"done": stop}))
    texts = [caption(sprites.world, draw_taught_scene(sprites.world, seed, i)) for i in range(count)]
    (folder / "captions.json").write_text(json.dumps(texts), "utf-8")
    return LatentSet(folder, seed)

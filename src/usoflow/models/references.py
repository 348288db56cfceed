"""Where reference pictures lie: position ids of the tokens of text, image and references.

FLUX gives every token three positions (index, row, column); text is at (0, 0, 0) and the image at
(0, row, column). The methods differ in where they put the tokens of a reference:

- `uxo`    USO and UNO: beyond the lower right corner of the image and of the references before it
           (universal rotary position embedding, arXiv 2504.02160; bytedance/USO, uso/flux/sampling.py)
- `offset` FLUX.1 Kontext with several pictures: index 1, tiled beside or below each other
- `index`  FLUX.1 Kontext: index 1, 2, 3, ..., each at the origin (arXiv 2506.15742)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from usoflow.errors import UsoflowError

Size = tuple[int, int]  # latent rows, latent columns
Place = tuple[int, int, int]  # index, first row, first column, in patches

DEFAULT_METHOD = "offset"


def position_ids(image: Size, references: Sequence[Size] = (), method: str = DEFAULT_METHOD) -> Tensor:
    """Ids of the image tokens, then of the tokens of each reference.

    Args:
        image: height and width of the latent; an odd side counts as padded by one.
        references: height and width of each reference latent, in the order of the chain.
        method: how references are placed, as `reference_latents_method` of a conditioning names it.

    Returns:
        float32 [tokens, 3].

    Raises:
        UsoflowError: `reference_method` for a method that there is not.
    """
    places = _placer(method)(image, references)
    grids = [
        _grid(image, (0, 0, 0)),
        *(_grid(size, place) for size, place in zip(references, places, strict=True)),
    ]
    return torch.cat(grids)


def patches(size: Size) -> Size:
    """Rows and columns of 2x2 patches that cover a latent."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _grid(size: Size, place: Place) -> Tensor:
    index, first_row, first_column = place
    rows, columns = patches(size)
    ids = torch.zeros(rows, columns, 3, device="cpu", dtype=torch.float32)
    ids[..., 0] = index
    ids[..., 1] += torch.arange(first_row, first_row + rows, device="cpu")[:, None]
    ids[..., 2] += torch.arange(first_column, first_column + columns, device="cpu")[None, :]
    return ids.flatten(0, 1)  # [rows * columns, 3]


def _uxo(image: Size, references: Sequence[Size]) -> Iterator[Place]:
    rows, columns = (2 * side for side in patches(image))
    for height, width in references:
        yield 0, *patches((rows, columns))
        rows, columns = rows + height, columns + width


def _offset(image: Size, references: Sequence[Size]) -> Iterator[Place]:
    rows = columns = 0
    for height, width in references:
        beside = height + rows > width + columns
        row, column = (0, columns) if beside else (rows, 0)
        yield 1, *patches((row, column))
        rows, columns = max(rows, height + row), max(columns, width + column)


def _index(image: Size, references: Sequence[Size]) -> Iterator[Place]:
    return ((index, 0, 0) for index in range(1, len(references) + 1))


_PLACERS: Mapping[str, Callable[[Size, Sequence[Size]], Iterator[Place]]] = MappingProxyType(
    {
        "uxo": _uxo,
        "offset": _offset,
        "index": _index,
        # The timestep that this one sets to zero for the references exists in later models only:
        # for FLUX.1 the reference behaves as `offset`.
        "index_timestep_zero": _offset,
    }
)


def _placer(method: str) -> Callable[[Size, Sequence[Size]], Iterator[Place]]:
    if "uxo" in method or "uso" in method:  # 'uxo/uno', and the 'uso' that the official pictures carry
        return _uxo
    if method not in _PLACERS:
        raise UsoflowError("reference_method", f"There is no reference method {method!r}.")
    return _PLACERS[method]

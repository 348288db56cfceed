"""Picture files: safely read into IMAGE and MASK arrays, and written so that nothing is half there.

Reading follows ComfyUI's `LoadImage` (EXIF turned, RGB, frames of one size as a batch, mask = 1 - alpha);
writing its `SaveImage` (values truncated to 8 bits, `PREFIX_00001_.png`, prompt and workflow embedded).
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from usoflow.durable import put
from usoflow.errors import UsoflowError
from usoflow.file_names import inside
from usoflow.nodes.context import PARTIAL_SUFFIX, Reserve, unreserved
from usoflow.workflow.metadata import png_info

MAX_PIXELS = 64_000_000  # all frames together: 768 MB as float32
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
PATIENCE = 2.0  # seconds that another program may have a finished picture open
EMPTY_MASK = (64, 64)  # what LoadImage gives for a picture without alpha

Array = NDArray[np.float32]


def read_picture(path: Path) -> tuple[Array, Array]:
    """A picture file as arrays.

    Args:
        path: any file that Pillow reads; what counts is its content, not its name.

    Returns:
        image [B, H, W, 3] and mask [B, H, W], float32 in 0..1; B is the number of frames.

    Raises:
        UsoflowError: `image_missing`, `image_invalid`, `image_too_large`.
    """
    with opened(path) as picture:
        frames = [_frame(frame) for frame in _frames(picture, path)]
    same = [frame for frame in frames if frame[0].shape == frames[0][0].shape]
    return np.stack([image for image, _ in same]), _masks([mask for _, mask in same])


def _masks(masks: list[Array | None]) -> Array:
    """One mask a frame; frames without transparency have zeros, in the size of the others."""
    size = next((mask.shape for mask in masks if mask is not None), EMPTY_MASK)
    opaque = np.zeros(size, dtype=np.float32)
    return np.stack([opaque if mask is None else mask for mask in masks])


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture file, as Pillow opens it; what reading it raises is a `UsoflowError` as of `read_picture`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb: our own limit is lower; odd EXIF or palettes: read on
            with Image.open(path) as picture:
                if picture.format == "EPS":  # which Pillow has a program draw that follows what it says
                    raise UsoflowError("image_invalid", f"{path} is PostScript, which is not read.")
                yield picture
    except (UsoflowError, MemoryError):
        raise
    except FileNotFoundError:
        raise UsoflowError("image_missing", f"{path} does not exist.") from None
    except Image.DecompressionBombError:
        raise _too_large(path, "far more") from None
    except UnidentifiedImageError:
        if path.suffix.lower() in (".heic", ".heif"):
            what, advice = (
                f"{path} is HEIC, which usoflow cannot read.",
                "Export it as JPEG or PNG.",
            )
            raise UsoflowError("image_invalid", what, remedy=advice) from None
        raise UsoflowError("image_invalid", f"{path} is not a picture.") from None
    except Exception as error:  # Pillow's decoders raise anything on damaged files: KeyError, TypeError, ...
        raise UsoflowError("image_invalid", f"{path} cannot be read as a picture: {error}.") from None


def _frames(picture: Image.Image, path: Path) -> Iterator[Image.Image]:
    """The frames as large as the first, refused before they are decoded if they are too many pixels.

    Those of another size, as a TIFF may have them, would be of no use, however large they are.
    """
    size = picture.width * picture.height
    pixels = size * frame_count(picture)
    if pixels > MAX_PIXELS:
        raise _too_large(path, f"{pixels / 1e6:.0f} million")
    for frame in itertools.islice(ImageSequence.Iterator(picture), frame_count(picture)):
        if frame.width * frame.height == size:  # turned or not, by its EXIF
            yield frame


def frame_count(picture: Image.Image) -> int:
    """How many pictures a file is; the others in a camera's JPEG (MPO) are previews and maps of the first."""
    return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)


def _too_large(path: Path, pixels: str) -> UsoflowError:
    return UsoflowError(
        "image_too_large", f"{path} has {pixels} pixels; {MAX_PIXELS // 1_000_000} million are the most."
    )


def _frame(frame: Image.Image) -> tuple[Array, Array | None]:
    """RGB and, if there is transparency, the mask."""
    turned = of_8_bits(ImageOps.exif_transpose(frame))
    image = _unit(turned.convert("RGB"))
    if _clear(turned):
        return image, np.float32(1) - _unit(turned.convert("RGBA").getchannel("A"))
    return image, None


def of_8_bits(picture: Image.Image) -> Image.Image:
    """A picture, or its 8 bits of grey where it has 16, which Pillow's conversions would clip to white.

    That one grey may be transparent shows in an alpha channel: in 8 bits its neighbours are the same.
    """
    _refuse_floats(picture)
    if not picture.mode.startswith("I"):
        return picture
    levels, clear = np.asarray(picture), picture.info.get("transparency")
    grey = Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8))
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey


def _refuse_floats(picture: Image.Image) -> None:
    """Which of them is white, nothing says."""
    if picture.mode == "F":
        raise UsoflowError(
            "image_invalid",
            "The picture holds floating-point numbers.",
            remedy="Save it with 8 or 16 bits.",
        )


def _unit(picture: Image.Image) -> Array:
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def write_upright(picture: Image.Image, path: Path) -> None:
    """Write a picture as a PNG file that reads as the picture does: turned, in a mode that PNG has.

    Raises:
        UsoflowError: `image_invalid`.
    """
    try:
        _as_png_has_it(ImageOps.exif_transpose(picture)).save(path)
    except UsoflowError:
        raise
    except Exception as error:  # Pillow reads lazily, see `opened`
        raise UsoflowError("image_invalid", f"{picture!r} cannot be read: {error}.") from None


def _as_png_has_it(picture: Image.Image) -> Image.Image:
    """A picture in the mode of PNG that keeps most of it."""
    _refuse_floats(picture)
    if picture.mode in PNG_MODES:
        return picture
    if picture.mode.startswith("I"):
        return picture.convert("I").convert("I;16")  # Pillow has no way from one order of bytes to the other
    return picture.convert("RGBA" if _clear(picture) else "RGB")


def _clear(picture: Image.Image) -> bool:
    """Whether it says anything of transparency."""
    return not {"A", "a"}.isdisjoint(picture.getbands()) or "transparency" in picture.info


def in_8_bits(images: Array) -> Iterator[Image.Image]:
    """A batch [B, H, W, C] as pictures, clipped to 0..1 and truncated, as the reference does it.

    One channel is grey.
    """
    for pixels in (np.clip(images, 0, 1) * 255).astype(np.uint8):
        yield Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def write_pictures(
    images: Array,
    root: Path,
    prefix: str,
    *,
    prompt: Mapping[str, Any],
    workflow: Mapping[str, Any] | None,
    compression: int = 4,
    reserve: Reserve = unreserved,
) -> list[PurePosixPath]:
    """Write a batch as PNG files.

    Args:
        images: [B, H, W, C] of 1, 3 or 4 channels, clipped to 0..1 and truncated to 8 bits.
        root: the output folder.
        prefix: start of the file names; may lead into subfolders of `root`, and may hold %width%, %height%,
            %year%, %month%, %day%, %hour%, %minute%, %second%, and in the name %batch_num%, from 0 on.
        prompt: embedded under the key `prompt`.
        workflow: embedded under the key `workflow`, if given.
        compression: zlib level.
        reserve: is told each file's path before it is written; what it raises ends the writing.

    Returns:
        Paths relative to `root`. A name is taken once only, also by several processes, and a file
        is complete when it appears under its name.

    Raises:
        UsoflowError: `save_failed`, `path_outside`.
    """
    folder, stem = _place(root, _filled_in(prefix, images.shape[2], images.shape[1]))
    metadata = png_info(prompt, {} if workflow is None else {"workflow": workflow})
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(in_8_bits(images)):
            with _reserved(folder, stem.replace("%batch_num%", str(number)), reserve) as partial:
                picture.save(partial, format="PNG", pnginfo=metadata, compress_level=compression)
            written.append(PurePosixPath(partial.with_suffix(".png").relative_to(root).as_posix()))
    except OSError as error:
        what = f"{folder} cannot be written to: {error.strerror or error}."
        advice = "Use a shorter filename_prefix." if error.errno == errno.ENAMETOOLONG else None
        raise UsoflowError("save_failed", what, remedy=advice) from None
    return written


def _place(root: Path, prefix: str) -> tuple[Path, str]:
    """Folder and file stem; refuses what would leave the output folder."""
    relative = inside(prefix)
    return root / relative.parent, relative.name


def _filled_in(prefix: str, width: int, height: int) -> str:
    values = {"width": str(width), "height": str(height)}
    formats = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
    values |= {name: time.strftime(code) for name, code in formats.items()}
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix


@contextmanager
def _reserved(folder: Path, stem: str, reserve: Reserve) -> Iterator[Path]:
    """A file to write to, which becomes the next free `stem_00001_.png` when the block ends."""
    number = _next_number(folder, stem)
    while True:
        partial = folder / f"{stem}_{number:05}_{PARTIAL_SUFFIX}"
        if _taken(partial):
            break
        number += 1
    try:
        reserve(partial.with_suffix(".png"))
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _rename(partial, partial.with_suffix(".png"))


def _rename(partial: Path, whole: Path) -> None:
    """Windows refuses it as long as a scanner of viruses, say, has the file open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            put(partial, whole)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _taken(partial: Path) -> bool:
    """Whether this number is ours now: nobody is writing it, nor has finished since we looked."""
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    if partial.with_suffix(".png").exists():
        partial.unlink()
        return False
    return True


def _next_number(folder: Path, stem: str) -> int:
    numbered = re.compile(rf"{re.escape(stem)}_(\d+)_\.png")
    taken = [int(match.group(1)) for entry in folder.iterdir() if (match := numbered.fullmatch(entry.name))]
    return max(taken, default=0) + 1

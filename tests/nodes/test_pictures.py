"""Picture files: what is read from every kind of file, and what is written, whatever the disk does."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from usoflow.errors import UsoflowError
from usoflow.nodes.pictures import read_picture, write_pictures, write_upright
from usoflow.server.files import content_type
from usoflow.workflow import metadata

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(width: int = 5, height: int = 3, *, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def refused(path: Path) -> UsoflowError:
    with pytest.raises(UsoflowError) as caught:
        read_picture(path)
    assert path.name in caught.value.detail
    return caught.value


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims to be this large."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = metadata.PNG_SIGNATURE + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    return start + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


class TestReading:
    def test_rgb(self, tmp_path: Path) -> None:
        original = picture()
        image, mask = read_picture(saved(tmp_path, original))
        assert image.shape == (1, 3, 5, 3)
        assert image.dtype == np.float32
        assert np.array_equal(np.round(image[0] * 255), np.asarray(original))
        assert mask.shape == (1, 64, 64)
        assert not mask.any()

    @pytest.mark.parametrize(
        ("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0)), (2, (0, -1))]
    )
    def test_exif_turns(self, tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
        """EXIF 2.32, 4.6.4: where the first row and column of the file are meant to be."""
        image = Image.new("RGB", (4, 2))
        image.putpixel((0, 0), RED)
        exif = Image.Exif()
        exif[0x0112] = orientation
        read, _ = read_picture(saved(tmp_path, image, exif=exif))
        assert read.shape[1:3] == ((4, 2) if orientation in (6, 8) else (2, 4))
        assert tuple(read[0][corner]) == (1, 0, 0)

    def test_mask_is_transparency(self, tmp_path: Path) -> None:
        image = Image.new("RGBA", (2, 1), (*RED, 255))
        image.putpixel((1, 0), (*GREEN, 51))
        read, mask = read_picture(saved(tmp_path, image))
        assert read[0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]
        assert mask[0, 0] == pytest.approx([0, 0.8])

    def test_palette(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([*BLUE, *GREEN])
        image.putpixel((1, 0), 1)
        read, mask = read_picture(saved(tmp_path, image))
        assert read[0, 0].tolist() == [[0, 0, 1], [0, 1, 0]]
        assert not mask.any()

    @pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
    def test_palette_with_transparency(self, tmp_path: Path, transparency: int | bytes) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([*BLUE, *GREEN])
        image.putpixel((1, 0), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read, mask = read_picture(saved(tmp_path, image, transparency=transparency))
        assert read[0, 0].tolist() == [[0, 0, 1], [0, 1, 0]]
        assert mask[0, 0].tolist() == [0, 1]

    def test_16_bit_grey(self, tmp_path: Path) -> None:
        levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
        read, _ = read_picture(saved(tmp_path, Image.fromarray(levels)))
        assert np.round(read[0, 0, :, 0] * 255).tolist() == [0, 1, 128, 255]

    def test_one_grey_of_16_bits_may_be_transparent(self, tmp_path: Path) -> None:
        """That one alone: its neighbours are the same grey in 8 bits."""
        levels = np.array([[1000, 1001, 1002]], dtype=np.uint16)
        read, mask = read_picture(saved(tmp_path, Image.fromarray(levels), transparency=1001))
        assert read.shape == (1, 1, 3, 3)
        assert mask.tolist() == [[[0, 1, 0]]]

    def test_32_bit_grey_saturates(self, tmp_path: Path) -> None:
        levels = np.array([[-5, 65535, 70000, 2**30]], dtype=np.int32)
        read, _ = read_picture(saved(tmp_path, Image.fromarray(levels), "a.tiff"))
        assert read[0, 0, :, 0].tolist() == [0, 1, 1, 1]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "LAB", "I;16", "RGBX"])
    def test_every_mode(self, tmp_path: Path, mode: str) -> None:
        read, mask = read_picture(saved(tmp_path, Image.new(mode, (4, 2)), "a.tiff"))
        assert read.shape == (1, 2, 4, 3)
        assert len(mask) == 1

    def test_floating_point_numbers_are_refused(self, tmp_path: Path) -> None:
        """Taken for levels of 8 bits, as Pillow does it, those of 0 to 1 would be a black picture."""
        for read in (
            lambda: read_picture(saved(tmp_path, Image.new("F", (4, 2), 0.5), "a.tiff")),
            lambda: write_upright(Image.new("F", (4, 2), 0.5), tmp_path / "b.png"),
        ):
            with pytest.raises(UsoflowError, match="floating-point numbers") as caught:
                read()
            assert caught.value.code == "image_invalid"
            assert "8 or 16 bits" in caught.value.remedy

    def test_postscript_is_not_followed(self, tmp_path: Path) -> None:
        """Pillow would have Ghostscript draw it; the file's name is any."""
        Image.new("RGB", (4, 2)).save(tmp_path / "a.eps")
        (tmp_path / "a.eps").rename(tmp_path / "a.png")
        with pytest.raises(UsoflowError, match="is PostScript") as caught:
            read_picture(tmp_path / "a.png")
        assert caught.value.code == "image_invalid"

    def test_cmyk_jpeg(self, tmp_path: Path) -> None:
        read, _ = read_picture(saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg"))
        assert read[0, 4, 4] == pytest.approx([1, 0, 0], abs=0.03)

    @pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
    def test_frames_are_a_batch(self, tmp_path: Path, name: str) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        options = {"lossless": True} if name == "a.webp" else {}
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
        read, mask = read_picture(path)
        assert np.round(read[:, 4, 4]).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        assert len(mask) == 3

    def test_frames_of_another_size_are_left_out(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", size, RED) for size in ((8, 8), (4, 4), (8, 8))]
        path = saved(tmp_path, frames[0], "a.tiff", save_all=True, append_images=frames[1:])
        assert read_picture(path)[0].shape == (2, 8, 8, 3)

    def test_frames_of_another_size_are_not_even_decoded(self, tmp_path: Path) -> None:
        """However large they are. What is cut off here would be an error."""
        frames = [Image.new("L", size, 9) for size in ((8, 8), (900, 900))]
        path = saved(tmp_path, frames[0], "a.tiff", save_all=True, append_images=frames[1:])
        path.write_bytes(path.read_bytes()[:-500_000])
        assert read_picture(path)[0].shape == (1, 8, 8, 3)

    def test_frames_with_and_without_alpha(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (8, 8), RED), Image.new("RGBA", (8, 8), (*RED, 0))]
        path = saved(tmp_path, frames[0], "a.tiff", save_all=True, append_images=frames[1:])
        read, mask = read_picture(path)
        assert len(read) == len(mask) == 2
        assert mask[1].min() == 1
        assert mask[0].max() == 0

    def test_content_counts_not_the_name(self, tmp_path: Path) -> None:
        original = picture()
        buffer = io.BytesIO()
        original.save(buffer, "PNG")
        (tmp_path / "a.webp").write_bytes(buffer.getvalue())
        read, _ = read_picture(tmp_path / "a.webp")
        assert np.array_equal(np.round(read[0] * 255), np.asarray(original))

    def test_missing(self, tmp_path: Path) -> None:
        assert refused(tmp_path / "a.png").code == "image_missing"

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP"])
    def test_not_a_picture(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        assert refused(tmp_path / "a.png").code == "image_invalid"

    def test_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").mkdir()
        assert refused(tmp_path / "a.png").code == "image_invalid"

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
    def test_truncated(self, tmp_path: Path, name: str) -> None:
        path = saved(tmp_path, picture(40, 40), name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        assert refused(path).code == "image_invalid"

    @pytest.mark.parametrize("side", [10_000, 30_000, 2**31 - 1])
    def test_too_large_is_refused_by_its_header(self, tmp_path: Path, side: int) -> None:
        """100 megapixels, and what Pillow itself takes for a bomb."""
        (tmp_path / "a.png").write_bytes(png_header(side, side))
        assert refused(tmp_path / "a.png").code == "image_too_large"

    def test_many_frames_are_too_large_together(self, tmp_path: Path) -> None:
        frames = [Image.new("P", (2000, 2000), index) for index in range(17)]
        path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
        assert refused(path).code == "image_too_large"

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_damage_never_crashes(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        """Bytes changed anywhere: a picture still, or one of our errors."""
        name = data.draw(st.sampled_from(["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"]))
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        options: dict[str, Any] = {} if name in ("a.gif", "a.bmp") else {"exif": exif}
        picture(9, 7).save(buffer, name[2:].replace("jpg", "jpeg"), **options)
        content = bytearray(buffer.getvalue())
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, len(content) - 1))
            content[position] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.getbasetemp() / "damaged"
        path.write_bytes(content)
        try:
            image, mask = read_picture(path)
        except UsoflowError as error:
            code = error.code
        else:
            code = "" if image.ndim == 4 and len(mask) == len(image) and image.max() <= 1 else "wrong"
        assert code in ("", "image_invalid", "image_too_large")


def write(root: Path, prefix: str = "out", *, count: int = 1, **options: Any) -> list[str]:
    images = np.full((count, 8, 16, 3), 0.5, dtype=np.float32)
    options = {"prompt": {}, "workflow": None} | options
    return [str(path) for path in write_pictures(images, root, prefix, **options)]


class TestWriting:
    def test_values_are_truncated_not_rounded(self, tmp_path: Path) -> None:
        levels = np.array([-1.0, 0.0, 0.9 / 255, 1 / 255, 1.9 / 255, 254.9 / 255, 1.0, 7.0])
        images = np.repeat(levels[None, None, :, None], 3, axis=3).astype(np.float32)
        (name,) = write_pictures(images, tmp_path, "a", prompt={}, workflow=None)
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 1, 1, 254, 255, 255]

    def test_one_channel_is_a_grey_picture(self, tmp_path: Path) -> None:
        levels = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4, 1)
        (name,) = write_pictures(levels, tmp_path, "a", prompt={}, workflow=None)
        with Image.open(tmp_path / name) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), (levels[0, ..., 0] * 255).astype(np.uint8))

    def test_counts_on(self, tmp_path: Path) -> None:
        assert write(tmp_path, count=2) == ["out_00001_.png", "out_00002_.png"]
        (tmp_path / "out_00007_.png").touch()
        (tmp_path / "other_00009_.png").touch()
        (tmp_path / "out_x_.png").touch()
        assert write(tmp_path) == ["out_00008_.png"]

    def test_counts_beyond_five_digits(self, tmp_path: Path) -> None:
        (tmp_path / "out_99999_.png").touch()
        assert write(tmp_path) == ["out_100000_.png"]
        assert write(tmp_path) == ["out_100001_.png"]

    def test_subfolder(self, tmp_path: Path) -> None:
        assert write(tmp_path, "a/b/c") == ["a/b/c_00001_.png"]
        assert write(tmp_path, "a\\b\\c") == ["a/b/c_00002_.png"]

    @pytest.mark.skipif(os.name == "nt", reason="a colon ends the name of a file there")
    def test_a_letter_and_a_colon_are_no_drive(self, tmp_path: Path) -> None:
        assert write(tmp_path, "a: cat") == ["a: cat_00001_.png"]

    def test_a_name_that_is_too_long_is_told_so(self, tmp_path: Path) -> None:
        with pytest.raises(UsoflowError) as caught:
            write(tmp_path, "x" * 300)
        assert caught.value.code == "save_failed"
        assert "shorter filename_prefix" in caught.value.remedy

    def test_size_and_date(self, tmp_path: Path) -> None:
        (name,) = write(tmp_path, "%width%x%height%-%year%")
        assert name.startswith("16x8-20")

    def test_number_in_the_batch(self, tmp_path: Path) -> None:
        """Each name counts for itself."""
        assert write(tmp_path, "a_%batch_num%", count=2) == ["a_0_00001_.png", "a_1_00001_.png"]
        assert write(tmp_path, "a_%batch_num%") == ["a_0_00002_.png"]

    @pytest.mark.parametrize(
        "prefix", ["../a", "a/../../b", "/tmp/a", "..\\a", "\\\\host\\a", "a\0b", "..", "a/../b"]
    )
    def test_stays_in_its_folder(self, tmp_path: Path, prefix: str) -> None:
        root = tmp_path / "output"
        with pytest.raises(UsoflowError) as caught:
            write(root, prefix)
        assert caught.value.code == "path_outside"
        assert not list(tmp_path.rglob("*.png"))

    @settings(max_examples=100, deadline=None)
    @given(prefix=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def test_any_prefix(self, tmp_path_factory: pytest.TempPathFactory, prefix: str) -> None:
        root = tmp_path_factory.mktemp("any")
        names, code = [], ""
        try:
            names = write(root / "output", prefix)
        except UsoflowError as error:
            code = error.code
        assert code in ("", "path_outside", "save_failed")
        files = [path.relative_to(root / "output").as_posix() for path in root.rglob("*") if path.is_file()]
        assert files == names

    def test_embeds_prompt_and_workflow(self, tmp_path: Path) -> None:
        prompt = {"1": {"class_type": "X", "inputs": {"text": 'ünï "q" \n 猫'}}}
        workflow = {"nodes": [], "extra": "é"}
        (name,) = write(tmp_path, prompt=prompt, workflow=workflow)
        texts = metadata.read((tmp_path / name).read_bytes())
        assert {key: json.loads(text) for key, text in texts.items()} == {
            "prompt": prompt,
            "workflow": workflow,
        }

    def test_no_workflow_where_there_is_none(self, tmp_path: Path) -> None:
        (name,) = write(tmp_path)
        assert set(metadata.read((tmp_path / name).read_bytes())) == {"prompt"}

    def test_concurrent_writers_take_distinct_names(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            names = [
                name for part in pool.map(lambda _: write(tmp_path, count=4), range(20)) for name in part
            ]
        assert len(set(names)) == len(names) == 80
        assert {path.name for path in tmp_path.iterdir()} == set(names)

    def test_never_replaces_a_file_that_appeared_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two processes looked at the folder at once, and the other was faster."""
        (tmp_path / "out_00001_.png").write_text("theirs")
        monkeypatch.setattr("usoflow.nodes.pictures._next_number", lambda folder, stem: 1)
        assert write(tmp_path) == ["out_00002_.png"]
        assert (tmp_path / "out_00001_.png").read_text() == "theirs"

    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "output").write_text("a file")
        with pytest.raises(UsoflowError) as caught:
            write(tmp_path / "output")
        assert caught.value.code == "save_failed"
        assert "None" not in caught.value.detail

    def test_full_disk_leaves_nothing(self, tmp_path: Path) -> None:
        """A limit on file sizes stands for the disk: setrlimit(2) makes write fail with EFBIG."""
        code = f"""
            import resource
            import numpy as np
            from pathlib import Path
            from usoflow.errors import UsoflowError
            from usoflow.nodes.pictures import write_pictures
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            noise = np.random.default_rng(0).random((1, 100, 100, 3), dtype=np.float32)
            try:
                write_pictures(noise, Path({str(tmp_path)!r}), "out", prompt={{}}, workflow=None)
            except UsoflowError as error:
                print(error.code, error.detail)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        assert done.stdout.startswith("save_failed")
        assert "File too large" in done.stdout
        assert list(tmp_path.iterdir()) == []


class TestFromMemory:
    def test_it_reads_as_its_file_does(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        file = saved(tmp_path, picture(8, 4), "phone.jpg", exif=exif)
        write_upright(Image.open(file), tmp_path / "copy.png")
        assert np.array_equal(read_picture(file)[0], read_picture(tmp_path / "copy.png")[0])

    @pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "PA", "I", "I;16", "1"])
    def test_in_any_mode(self, tmp_path: Path, mode: str) -> None:
        write_upright(Image.new(mode, (5, 3)), tmp_path / "copy.png")
        assert read_picture(tmp_path / "copy.png")[0].shape == (1, 3, 5, 3)

    def test_sixteen_bits_stay(self, tmp_path: Path) -> None:
        write_upright(Image.new("I", (2, 2), 32768), tmp_path / "copy.png")
        assert Image.open(tmp_path / "copy.png").getpixel((0, 0)) == 32768

    @pytest.mark.parametrize("order", ["I;16", "I;16L", "I;16B"])
    def test_sixteen_bits_stay_in_either_order(self, tmp_path: Path, order: str) -> None:
        levels = np.array([[0, 257, 32896, 65535]], dtype=">u2" if order == "I;16B" else "<u2")
        given = Image.frombytes(order, (4, 1), levels.tobytes())
        given.info["transparency"] = 257
        write_upright(given, tmp_path / "copy.png")
        with Image.open(tmp_path / "copy.png") as copy:
            assert np.asarray(copy).tolist() == levels.tolist()
        assert read_picture(tmp_path / "copy.png")[1].tolist() == [[[0, 1, 0, 0]]]

    def test_what_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        whole = saved(tmp_path, picture(40, 40)).read_bytes()
        with pytest.raises(UsoflowError) as caught:
            write_upright(Image.open(io.BytesIO(whole[:200])), tmp_path / "copy.png")
        assert caught.value.code == "image_invalid"


def test_of_a_cameras_jpeg_the_first_picture_counts(tmp_path: Path) -> None:
    """What else is in an MPO file are previews and maps of the same scene."""
    file = saved(
        tmp_path,
        picture(16, 8),
        "camera.jpg",
        format="MPO",
        save_all=True,
        append_images=[picture(16, 8, seed=1)],
    )
    with Image.open(file) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
    assert read_picture(file)[0].shape == (1, 8, 16, 3)
    assert content_type(file) == "image/jpeg"

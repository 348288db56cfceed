"""`usoflow models`: listing, checking, and downloading from a hub that these tests serve."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shell import usoflow
from usoflow.catalogue import KNOWN_FILES
from usoflow.settings import size_in_words

CHECKPOINT = "checkpoints/flux1-dev-fp8.safetensors"
LORA = "loras/uso-flux1-dit-lora-v1.safetensors"


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors (None removes one), keeping what the file declares."""
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
    kept = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(kept, path, metadata)


@pytest.fixture
def tree(small_models: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_models, tmp_path / "models")
    return tmp_path / "models"


def test_what_is_no_file(tmp_path: Path) -> None:
    for name in ("mine.safetensors", str(tmp_path)):
        done = usoflow("models", "check", name)
        assert (done.code, done.err.count("is not a file")) == (2, 1)


def test_a_folder_is_only_made_for_who_agrees(tmp_path: Path) -> None:
    done = usoflow("models", "pull", "--models", tmp_path / "new" / "folder")
    assert done.code == 2
    assert "licence" in done.err
    assert list(tmp_path.iterdir()) == []


def test_json_is_for_the_list_alone() -> None:
    done = usoflow("models", "--json", "pull")
    assert done.code == 2
    assert json.loads(done.out)["error"]["code"] == "command_invalid"


class TestList:
    def test_what_is_there_and_what_is_missing(self, tree: Path) -> None:
        (tree / LORA).unlink()
        (tree / "vae").mkdir()
        (tree / "vae/broken.safetensors").write_bytes(b"\x00" * 40)
        done = usoflow("models", "--models", tree)
        assert done.code == 0
        assert "FLUX.1 transformer, CLIP-L text encoder, T5 text encoder, FLUX VAE (F16 100%)" in done.out
        assert "vae/broken.safetensors" in done.out
        assert "not a valid safetensors file" in done.out
        missing = done.out.partition("missing: ")[2]
        assert LORA in missing
        assert "huggingface.co/Comfy-Org/USO_1.0_Repackaged" in missing
        assert CHECKPOINT not in missing
        assert f"into {tree / 'loras'}" in missing
        assert str(tree / CHECKPOINT) in done.out

    @pytest.mark.parametrize(
        ("count", "expected"),
        [(17_246_524_772, "17.2 GB"), (478_000_000, "478 MB"), (21_500_000, "21.5 MB"), (2_800, "2.8 kB")],
    )
    def test_sizes(self, count: int, expected: str) -> None:
        assert size_in_words(count) == expected

    def test_a_damaged_file_is_still_to_be_had(self, tree: Path) -> None:
        (tree / LORA).write_bytes((tree / LORA).read_bytes()[:-8])
        record = json.loads(usoflow("models", "--models", tree, "--json").out)
        assert [file["folder"] for file in record["missing"]] == [str(tree / "loras")]
        done = usoflow("models", "--models", tree)
        assert f"`usoflow models pull --models {tree}` gets what is missing." in done.out

    def test_the_folder_may_be_named_before_what_is_to_be_done(self, tree: Path) -> None:
        done = usoflow("models", "--models", tree, "pull")
        assert done.out == "All files of the tutorial are there.\n"

    def test_for_programs(self, tree: Path) -> None:
        (tree / LORA).unlink()
        record = json.loads(usoflow("models", "--models", tree, "--json").out)
        assert {file["name"] for file in record["files"]} == {
            f.name for f in KNOWN_FILES if f.folder != "loras"
        }
        assert [file["folder"] for file in record["missing"]] == [str(tree / "loras")]


class TestCheck:
    @pytest.mark.parametrize("name", [CHECKPOINT, "clip_vision/sigclip_vision_patch14_384.safetensors"])
    def test_a_good_file(self, tree: Path, name: str) -> None:
        done = usoflow("models", "check", tree / name)
        assert (done.code, done.err) == (0, "")
        assert "every tensor that the network needs is there" in done.out
        assert "every value is finite" in done.out

    def test_a_lora_and_its_transformer(self, tree: Path) -> None:
        done = usoflow("models", "check", tree / LORA, "--with", tree / CHECKPOINT)
        assert "fits flux1-dev-fp8.safetensors: 12 of 12 layers" in done.out
        done = usoflow("models", "check", tree / LORA, "--models", tree)
        assert "12 of 12 layers" in done.out

    def test_every_tensor_is_listed(self, tree: Path) -> None:
        done = usoflow("models", "check", tree / LORA, "--tensors", "--models", tree)
        listed = [line.split("  ") for line in done.out.splitlines() if line.endswith("  F16")]
        with safe_open(tree / LORA, framework="pt") as reader:
            expected = {name: str(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        assert {name: shape for name, shape, _ in listed} == expected

    @pytest.mark.parametrize(("name", "method"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr")])
    def test_another_method_than_lora(self, tree: Path, name: str, method: str) -> None:
        save_file({f"lora_unet_a.{name}": torch.ones(2, 2)}, tree / "other.safetensors")
        done = usoflow("models", "check", tree / "other.safetensors", "--models", tree)
        assert done.code == 4
        assert method in done.err

    def test_a_lora_of_another_model(self, tree: Path) -> None:
        tensors = {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 4)}
        tensors["lora_unet_down_blocks_0.lora_up.weight"] = torch.ones(4, 2)
        save_file(tensors, tree / "other.safetensors")
        done = usoflow("models", "check", tree / "other.safetensors", "--models", tree)
        assert done.code == 4
        assert "none of its 1 layers" in done.err

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
    def test_values_that_are_not_finite(self, tree: Path, dtype: torch.dtype) -> None:
        name = "vae.decoder.conv_in.weight"
        broken = load_file(tree / CHECKPOINT)[name].clone()
        broken[0, 0, 0, 0] = float("nan")
        rewrite(tree / CHECKPOINT, **{name: broken.to(dtype)})
        done = usoflow("models", "check", tree / CHECKPOINT)
        assert done.code == 4
        assert "1 tensors have values that are not finite: decoder.conv_in.weight" in done.err

    def test_a_tensor_that_is_missing(self, tree: Path) -> None:
        rewrite(tree / CHECKPOINT, **{"vae.decoder.conv_out.weight": None})
        done = usoflow("models", "check", tree / CHECKPOINT)
        assert done.code == 4
        assert "decoder.conv_out.weight" in done.err

    def test_another_file(self, tree: Path) -> None:
        save_file({"a": torch.ones(2)}, tree / "a.safetensors")
        assert usoflow("models", "check", tree / "a.safetensors").code == 4


class Hub:
    """What the server has, how it misbehaves, and the ranges that were asked of it.

    `breaks_after` is a place in a file beyond which nothing comes, `most_at_once` the most of an answer.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.ranges: list[str] = []
        self.breaks_after: int | None = None
        self.most_at_once: int | None = None
        self.flips_a_bit = False
        self.gated = False
        self.url = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            data = hub.files.get(self.path.partition("?")[0])
            if data is None or hub.gated:
                self.send_response(401 if hub.gated else 404)
                self.send_header("X-Error-Code", "GatedRepo" if hub.gated else "EntryNotFound")
                self.end_headers()
                return
            wanted = self.headers.get("Range")
            first = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0  # type: ignore[index]
            if with_body and wanted:
                hub.ranges.append(wanted)
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - first))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if with_body:
                last = first + hub.most_at_once if hub.most_at_once else hub.breaks_after
                body = bytearray(data[first:last])
                body[-1:] = bytes([body[-1] ^ 1]) if hub.flips_a_bit else body[-1:]
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    return Handler


@pytest.fixture
def hub(small_models: Path) -> Iterator[Hub]:
    files = {
        re.sub(r"^https://[^/]+", "", file.url): (small_models / file.folder / file.name).read_bytes()
        for file in KNOWN_FILES
    }
    with serving(Hub(files)) as hub:
        yield hub


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()


class TestPull:
    """In processes of their own: huggingface_hub reads its variables when it is imported."""

    def pull(
        self, models: Path, endpoint: str, *arguments: str, before: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        models.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(models.parent / "hf"),
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables,
        }  # fmt: skip
        code = f"{before}from usoflow.cli.main import main; main()"
        command = [sys.executable, "-c", code, "models", "pull", "--models", str(models), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )

    def test_all_files_arrive_whole_and_then_nothing_is_left_to_do(
        self, hub: Hub, tmp_path: Path, small_models: Path
    ) -> None:
        done = self.pull(tmp_path / "models", hub.url, "--yes")
        assert done.returncode == 0, done.stderr
        for file in KNOWN_FILES:
            assert file.licence in done.stdout
            arrived = tmp_path / "models" / file.folder / file.name
            assert arrived.read_bytes() == (small_models / file.folder / file.name).read_bytes()
        assert "All files" in self.pull(tmp_path / "models", hub.url).stdout

    def test_a_new_folder_may_be_named_by_the_variable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new = tmp_path / "new" / "models"
        monkeypatch.setenv("USOFLOW_MODELS", str(new))
        monkeypatch.setattr("sys.stdin", io.StringIO())
        done = usoflow("models", "pull")
        assert "there is no terminal to ask on" in done.err
        assert not new.parent.exists()

    def test_licences_are_not_agreed_to_by_nobody(self, hub: Hub, tmp_path: Path) -> None:
        done = self.pull(tmp_path / "models", hub.url)
        assert done.returncode == 2
        assert "--yes" in done.stderr
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_a_download_that_broke_off_is_continued(self, hub: Hub, tmp_path: Path, tree: Path) -> None:
        (tree / CHECKPOINT).unlink()
        hub.breaks_after = 4_000_000
        first = self.pull(tree, hub.url, "--yes")
        assert first.returncode == 4
        assert not (tree / CHECKPOINT).exists()
        hub.breaks_after = None
        hub.ranges.clear()
        second = self.pull(tree, hub.url, "--yes")
        assert second.returncode == 0, second.stderr
        assert hub.ranges == ["bytes=4000000-"]  # and not the beginning again
        assert (tree / CHECKPOINT).is_file()

    def test_a_connection_that_breaks_is_taken_up_again(self, hub: Hub, tree: Path) -> None:
        (tree / CHECKPOINT).unlink()
        hub.most_at_once = 3_000_000
        done = self.pull(tree, hub.url, "--yes")
        assert done.returncode == 0, done.stderr
        assert hub.ranges == ["bytes=3000000-", "bytes=6000000-", "bytes=9000000-"]

    def test_bytes_that_changed_on_the_way_are_noticed(self, hub: Hub, tree: Path) -> None:
        (tree / LORA).unlink()
        hub.flips_a_bit = True
        done = self.pull(tree, hub.url, "--yes")
        assert done.returncode == 4
        assert "checksum" in done.stderr
        assert not list(tree.rglob("*.part"))
        hub.flips_a_bit = False
        assert self.pull(tree, hub.url, "--yes").returncode == 0

    def test_another_file_under_the_name_is_refused(self, hub: Hub, tree: Path) -> None:
        (tree / LORA).unlink()
        path = next(path for path in hub.files if path.endswith(Path(LORA).name))
        hub.files[path] = next(data for name, data in hub.files.items() if "projector" in name)
        done = self.pull(tree, hub.url, "--yes")
        assert done.returncode == 4
        assert "USO style projector" in done.stderr
        assert not (tree / LORA).exists()

    @pytest.mark.parametrize(
        "variables",
        [{"HF_HUB_OFFLINE": "1"}, pytest.param({}, marks=pytest.mark.full)],  # it tries for 20 s
        ids=["offline", "unreachable"],
    )
    def test_without_a_network(self, tmp_path: Path, variables: dict[str, str]) -> None:
        done = self.pull(tmp_path / "models", "http://127.0.0.1:9", "--yes", **variables)
        assert done.returncode == 4
        assert "Traceback" not in done.stderr
        assert "network" in done.stderr

    def test_a_file_that_the_hub_does_not_have(self, hub: Hub, tmp_path: Path) -> None:
        hub.files.clear()
        done = self.pull(tmp_path / "models", hub.url, "--yes")
        assert done.returncode == 4
        assert "404" in done.stderr
        assert "See https://huggingface.co/Comfy-Org/flux1-dev" in done.stderr

    def test_a_licence_that_is_agreed_to_on_the_site(self, hub: Hub, tmp_path: Path) -> None:
        hub.gated = True
        done = self.pull(tmp_path / "models", hub.url, "--yes")
        assert done.returncode == 4
        assert "Agree to the licence at https://huggingface.co/Comfy-Org/flux1-dev" in done.stderr

    def test_a_folder_may_be_a_link_to_another_disk(self, hub: Hub, tree: Path) -> None:
        """Where a file cannot be moved to from beside the folders."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
            assert os.stat(other).st_dev != os.stat(tree).st_dev
            (tree / LORA).unlink()
            (tree / "loras").rmdir()
            (tree / "loras").symlink_to(other)
            done = self.pull(tree, hub.url, "--yes")
            assert done.returncode == 0, done.stderr
            assert [path.name for path in Path(other).iterdir()] == [Path(LORA).name]

    def test_a_disk_without_room_is_no_matter_of_the_network(self, hub: Hub, tree: Path) -> None:
        """A limit of this process's files, as a full disk beyond what it told."""
        (tree / CHECKPOINT).unlink()
        limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (5_000_000, 5_000_000));"
        ignore = "import signal as s; s.signal(s.SIGXFSZ, s.SIG_IGN);"
        done = self.pull(tree, hub.url, "--yes", before=limit + ignore)
        assert done.returncode == 2
        assert "File too large" in done.stderr
        assert "space left" in done.stderr
        assert hub.ranges == []  # it is not asked for again
        assert self.pull(tree, hub.url, "--yes").returncode == 0
        assert len(hub.ranges) == 1  # what was there is not lost

    def test_room_is_looked_for_before_it_begins(self, hub: Hub, tree: Path) -> None:
        (tree / CHECKPOINT).unlink()
        full = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, 1);"
        done = self.pull(tree, hub.url, "--yes", before=full)
        assert done.returncode == 2
        assert "are to come, and there is room for 0.0" in done.stderr

    def test_a_sound_file_of_the_same_name_is_kept(self, hub: Hub, tree: Path) -> None:
        """Somebody's own, of another kind; what is damaged is replaced."""
        projector = (tree / "model_patches/uso-flux1-projector-v1.safetensors").read_bytes()
        (tree / LORA).write_bytes(projector)
        (tree / CHECKPOINT).write_bytes((tree / CHECKPOINT).read_bytes()[:-1])
        done = self.pull(tree, hub.url, "--yes")
        assert done.returncode == 0, done.stderr
        kept = tree / "loras" / f"1_{Path(LORA).name}"
        assert kept.read_bytes() == projector
        assert f"kept as {kept.name}" in done.stdout
        assert f"replaces {tree / CHECKPOINT}, which is damaged" in done.stdout
        assert [path.name for path in (tree / "checkpoints").iterdir()] == [Path(CHECKPOINT).name]

    def test_half_of_what_the_hub_had_before_goes(self, hub: Hub, tree: Path) -> None:
        (tree / LORA).unlink()
        staging = tree / "loras" / ".download"
        staging.mkdir()
        (staging / f"{Path(LORA).name}.{'0' * 16}.part").write_bytes(b"half of an older one")
        assert self.pull(tree, hub.url, "--yes").returncode == 0
        assert not staging.exists()

    def test_nothing_is_left_of_what_did_not_begin(self, tmp_path: Path) -> None:
        done = self.pull(tmp_path / "hub", "http://127.0.0.1:9", "--yes", "--models", str(tmp_path / "a/b"),
                         HF_HUB_OFFLINE="1")  # fmt: skip
        assert done.returncode == 4
        assert not (tmp_path / "a").exists()

    def test_there_is_one_set(self, tmp_path: Path) -> None:
        assert usoflow("models", "pull", "sdxl").code == 2

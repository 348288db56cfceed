"""Where models and pictures are looked for, and that no name leads out of its folder."""

from __future__ import annotations

import os
import re
import string
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from forbidden import forbid
from usoflow.errors import UsoflowError
from usoflow.file_names import check_prefix
from usoflow.settings import MODEL_FOLDERS, Folders, bytes_of, check_writable, existing_part, find_folders

ESCAPES = [
    "../a.png",
    "x/../../a.png",
    "..",
    "/etc/passwd",
    "//host/a.png",
    "..\\a.png",
    "\\\\host\\share\\a.png",
    "a\0.png",
    *(["C:\\a.png", "c:/a.png", "a.png:stream"] if os.name == "nt" else []),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of the person who runs the tests, and a working folder of their own."""
    for name in ("USOFLOW_MODELS", "USOFLOW_INPUT", "USOFLOW_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def code_of(error: pytest.ExceptionInfo[UsoflowError]) -> str:
    return error.value.code


class TestModelFolders:
    def test_without_any_the_pocket_models_serve(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / "data")
        folders = find_folders()
        assert folders.list("checkpoints") == ["usoflow-pocket.safetensors"]
        assert folders.models["checkpoints"][0] == tmp_path / "data" / "models" / "checkpoints"
        touch(tmp_path / "data" / "models" / "loras" / "own.safetensors")
        assert find_folders().list("checkpoints") == ["usoflow-pocket.safetensors"]
        assert "own.safetensors" in find_folders().list("loras")
        touch(tmp_path / "data" / "models" / "checkpoints" / "own.safetensors")
        assert find_folders().list("checkpoints") == ["own.safetensors"]

    @pytest.mark.parametrize("folder", ["checkpoints", "diffusion_models", "unet"])
    def test_what_draws_takes_their_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
    ) -> None:
        monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / "data")
        touch(tmp_path / "data" / "models" / folder / "own.gguf")
        assert find_folders().list("model_patches") == []

    @pytest.mark.parametrize("given_as", ["ComfyUI", "ComfyUI/models"])
    def test_comfyui_folder_or_its_models(self, tmp_path: Path, given_as: str) -> None:
        file = touch(tmp_path / "ComfyUI/models/loras/sub/a.safetensors")
        folders = find_folders(models=tmp_path / given_as)
        assert folders.list("loras") == ["sub/a.safetensors"]
        assert folders.model("loras", "sub/a.safetensors") == file
        assert folders.model("loras", "sub\\a.safetensors") == file

    @pytest.mark.parametrize(
        ("kind", "directory"), [(kind, name) for kind, names in MODEL_FOLDERS.items() for name in names]
    )
    def test_old_and_new_names(self, tmp_path: Path, kind: str, directory: str) -> None:
        touch(tmp_path / directory / "a.safetensors")
        folders = find_folders(models=tmp_path)
        assert {k: folders.list(k) for k in MODEL_FOLDERS if folders.list(k)} == {kind: ["a.safetensors"]}

    def test_the_names_of_comfyui(self) -> None:
        assert MODEL_FOLDERS["clip_vision"] == ("clip_vision", "clip_visions")
        assert MODEL_FOLDERS["diffusion_models"] == ("diffusion_models", "unet")
        assert MODEL_FOLDERS["text_encoders"] == ("text_encoders", "clip")

    def test_same_name_twice_is_listed_once_and_the_first_folder_wins(self, tmp_path: Path) -> None:
        first = touch(tmp_path / "diffusion_models/a.safetensors")
        touch(tmp_path / "unet/a.safetensors")
        folders = find_folders(models=tmp_path)
        assert folders.list("diffusion_models") == ["a.safetensors"]
        assert folders.model("diffusion_models", "a.safetensors") == first

    def test_only_safetensors_are_offered(self, tmp_path: Path) -> None:
        for name in ("a.ckpt", "b.SAFETENSORS", "c.safetensors.part", "d.pt", ".safetensors"):
            touch(tmp_path / "vae" / name)
        (tmp_path / "vae" / "folder.safetensors").mkdir()
        assert find_folders(models=tmp_path).list("vae") == ["b.SAFETENSORS"]

    @pytest.mark.skipif(os.name == "nt", reason="there it parts folders, on the disk too")
    def test_a_name_with_a_backslash_is_not_offered(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Out of an archive made on Windows: in a workflow it would be a file in a folder."""
        touch(tmp_path / "loras" / "styles\\a.safetensors")
        touch(tmp_path / "loras" / "b.safetensors")
        assert find_folders(models=tmp_path).list("loras") == ["b.safetensors"]
        assert "is not offered" in caplog.text

    def test_links_are_followed_also_in_circles(self, tmp_path: Path) -> None:
        touch(tmp_path / "disk/a.safetensors")
        (tmp_path / "models/loras").mkdir(parents=True)
        (tmp_path / "models/loras/linked").symlink_to(tmp_path / "disk")
        (tmp_path / "disk/circle").symlink_to(tmp_path / "disk")
        folders = find_folders(models=tmp_path / "models")
        names = folders.list("loras")
        assert "linked/a.safetensors" in names
        assert len(names) <= 2
        assert folders.model("loras", "linked/a.safetensors").is_file()

    def test_a_folder_that_cannot_be_read_is_told_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A link to itself, which root cannot read either."""
        (tmp_path / "loras").symlink_to(tmp_path / "loras")
        for _ in range(2):
            assert find_folders(models=tmp_path).list("loras") == []
        assert len(caplog.messages) == 1
        assert f"{tmp_path / 'loras'} cannot be read" in caplog.text

    def test_option_before_variable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        touch(tmp_path / "a/vae/a.safetensors")
        touch(tmp_path / "b/vae/b.safetensors")
        touch(tmp_path / "c/vae/c.safetensors")
        monkeypatch.setenv("USOFLOW_MODELS", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
        assert find_folders().list("vae") == ["a.safetensors", "b.safetensors"]
        assert find_folders(models=tmp_path / "c").list("vae") == ["c.safetensors"]

    def test_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(name, str(tmp_path))
        monkeypatch.setenv("USOFLOW_OUTPUT", "~/made")
        (tmp_path / "models/loras").mkdir(parents=True)
        found = find_folders(models=Path("~/models"), inputs=Path("~"))
        assert found.models["loras"][0] == tmp_path / "models/loras"
        assert (found.inputs, found.output) == ((tmp_path,), tmp_path / "made")

    def test_a_home_that_nobody_has_is_a_name(self, tmp_path: Path) -> None:
        """A folder may be called so."""
        (tmp_path / "here/~nobody-of-this-name").mkdir()
        for options in ({"models": Path("~nobody-of-this-name")}, {"inputs": Path("~nobody-of-this-name")}):
            assert find_folders(**options, output=Path("~nobody-of-this-name"))
            with pytest.raises(UsoflowError) as caught:
                find_folders(**{key: Path("~nobody-of-that-name") for key in options})
            assert code_of(caught) == "file_not_found"

    def test_places_that_may_not_be_looked_into_hold_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch(tmp_path / "models/loras/mine.safetensors")
        touch(tmp_path / "secret/theirs.safetensors")
        (tmp_path / "models/loras/theirs.safetensors").symlink_to(tmp_path / "secret/theirs.safetensors")
        forbid(monkeypatch, tmp_path / "secret")
        folders = find_folders(models=tmp_path / "models")
        assert folders.list("loras") == ["mine.safetensors"]
        with pytest.raises(UsoflowError) as caught:
            folders.model("loras", "theirs.safetensors")
        assert code_of(caught) == "model_missing"
        for options in ({"models": tmp_path / "secret/models"}, {"inputs": tmp_path / "secret/input"}):
            with pytest.raises(UsoflowError, match="cannot be read") as caught:
                find_folders(**options)
            assert code_of(caught) == "file_not_found"
        monkeypatch.chdir(tmp_path / "secret")
        assert find_folders().list("input") == []
        assert existing_part(tmp_path / "secret/output/x") == tmp_path / "secret"

    def test_folder_that_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsoflowError) as error:
            find_folders(models=tmp_path / "none")
        assert code_of(error) == "file_not_found"
        monkeypatch.setenv("USOFLOW_MODELS", str(tmp_path / "nowhere"))
        with pytest.raises(UsoflowError, match="nowhere"):
            find_folders()

    def test_missing_model(self, tmp_path: Path) -> None:
        with pytest.raises(UsoflowError, match=f"{tmp_path}/vae") as error:
            find_folders(models=tmp_path).model("vae", "a.safetensors")
        assert code_of(error) == "model_missing"


class TestExtraModelPaths:
    """https://docs.comfy.org/development/core-concepts/models: extra_model_paths.yaml."""

    def found(self, tmp_path: Path, text: str, *, file: str = "ComfyUI/extra_model_paths.yaml") -> Folders:
        (tmp_path / "ComfyUI/models").mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
        return find_folders(models=tmp_path / "ComfyUI")

    def test_sections_lines_and_base_path(self, tmp_path: Path) -> None:
        touch(tmp_path / "other/one/a.safetensors")
        touch(tmp_path / "other/two/b.safetensors")
        touch(tmp_path / "third/clips/c.safetensors")
        text = f"""
            # a comment
            a111:
                base_path: {tmp_path}/other/
                is_default: true
                loras: |
                    one
                    two
                controlnet: cn
            third:
                base_path: {tmp_path}/third
                clip: clips
        """
        folders = self.found(tmp_path, text)
        assert folders.list("loras") == ["a.safetensors", "b.safetensors"]
        assert folders.list("text_encoders") == ["c.safetensors"]

    def test_a_default_section_comes_before_the_models_folder(self, tmp_path: Path) -> None:
        """Where both have a file of one name, and where downloads go."""
        touch(tmp_path / "ComfyUI/models/vae/a.safetensors")
        touch(tmp_path / "fast/vae/a.safetensors")
        for value, wanted in (("true", "fast"), ("false", "ComfyUI/models")):
            text = f"x:\n  base_path: {tmp_path}/fast\n  is_default: {value}\n  vae: vae\n"
            folders = self.found(tmp_path, text)
            assert folders.model("vae", "a.safetensors") == tmp_path / wanted / "vae/a.safetensors"

    @pytest.mark.parametrize("base", ["base_path: extra", "", "base_path: $EXTRA", "base_path: ~/extra"])
    def test_base_path_may_be_relative_absent_a_variable_or_home(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
    ) -> None:
        monkeypatch.setenv("EXTRA", str(tmp_path / "ComfyUI/extra"))
        monkeypatch.setenv("HOME", str(tmp_path / "ComfyUI"))
        touch(tmp_path / "ComfyUI/extra/mine/a.safetensors")
        line = "mine" if base else "extra/mine"
        assert self.found(tmp_path, f"x:\n  {base}\n  vae: {line}\n").list("vae") == ["a.safetensors"]

    def test_absolute_lines(self, tmp_path: Path) -> None:
        touch(tmp_path / "disk/a.safetensors")
        assert self.found(tmp_path, f"x:\n  base_path: /none\n  unet: {tmp_path}/disk\n").list(
            "diffusion_models"
        ) == ["a.safetensors"]

    def test_is_found_beside_the_models_folder_too(self, tmp_path: Path) -> None:
        touch(tmp_path / "ComfyUI/x/a.safetensors")
        self.found(tmp_path, "x:\n  vae: x\n")
        assert find_folders(models=tmp_path / "ComfyUI/models").list("vae") == ["a.safetensors"]

    @pytest.mark.parametrize("text", ["", "# only comments", "x:\n  # all commented\n", "x: {}"])
    def test_nothing_in_it(self, tmp_path: Path, text: str) -> None:
        assert self.found(tmp_path, text).list("vae") == []

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "- a\n- b",
            "x: [1, 2]",
            "x: text",
            "x:\n  base_path: 5",
            "x:\n  vae: [a, b]",
            "x:\n  vae: 7",
            "7",
        ],
    )
    def test_broken(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(UsoflowError, match=r"extra_model_paths\.yaml") as error:
            self.found(tmp_path, text)
        assert code_of(error) == "settings_invalid"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("mine:\n  loras: 5", "mine, loras: 5 is no path"),
            ("mine:\n  loras: [a, b]", "mine, loras: ['a', 'b'] is no path"),
            ("mine:\n  base_path: 7", "mine, base_path: 7 is no path"),
            ("mine: text", "mine: 'text' stands where lines"),
            ("7", "7 stands where lines"),
        ],
    )
    def test_section_and_key_are_told(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(UsoflowError, match=re.escape(said)):
            self.found(tmp_path, text)

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "ComfyUI/models").mkdir(parents=True)
        (tmp_path / "ComfyUI/extra_model_paths.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsoflowError) as error:
            find_folders(models=tmp_path / "ComfyUI")
        assert code_of(error) == "settings_invalid"


class TestPictures:
    def test_where_they_are_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Here, in ComfyUI's input folder, beside the workflow; unless a folder is given."""
        touch(tmp_path / "here/input/a.png")
        touch(tmp_path / "ComfyUI/input/b.JPG")
        touch(tmp_path / "ComfyUI/models/vae/x.safetensors")
        touch(tmp_path / "flows/c.webp")
        touch(tmp_path / "option/d.png")
        touch(tmp_path / "variable/e.png")

        def listed(**options: Path) -> list[str]:
            beside = tmp_path / "flows/flow.json"
            return list(find_folders(beside=beside, **options).list("input"))

        assert listed(models=tmp_path / "ComfyUI") == ["a.png", "b.JPG", "c.webp"]
        assert listed(models=tmp_path / "ComfyUI/models") == ["a.png", "b.JPG", "c.webp"]
        assert listed(inputs=tmp_path / "option") == ["d.png"]
        monkeypatch.setenv("USOFLOW_INPUT", str(tmp_path / "variable"))
        assert listed() == ["e.png"]

    def test_subfolders_are_read_but_not_listed(self, tmp_path: Path) -> None:
        file = touch(tmp_path / "in/sub/a.png")
        touch(tmp_path / "in/notes.txt")
        folders = find_folders(inputs=tmp_path / "in")
        assert folders.list("input") == []
        assert folders.picture("input", "sub/a.png") == file

    def test_given_pictures_come_first(self, tmp_path: Path) -> None:
        touch(tmp_path / "in/a.png")
        other = touch(tmp_path / "other.png")
        folders = find_folders(inputs=tmp_path / "in", given_images={"a.png": other})
        assert folders.picture("input", "a.png") == other
        assert folders.exists("input", "a.png")
        assert folders.list("input") == ["a.png"]

    def test_output_and_temp(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_folders().output == Path("output")
        monkeypatch.setenv("USOFLOW_OUTPUT", str(tmp_path / "out"))
        assert find_folders().output == tmp_path / "out"
        assert find_folders(output=tmp_path / "o").output == tmp_path / "o"
        file = touch(tmp_path / "out/a.png")
        assert find_folders().picture("output", "a.png") == file
        assert not find_folders().exists("temp", "a.png")

    @pytest.mark.parametrize("output", ["link", "link/below", "x" * 300, "file", "file/below"])
    def test_an_output_that_cannot_be_made(self, tmp_path: Path, output: str) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "nothing")
        touch(tmp_path / "file")
        check_writable(tmp_path / "new" / "folder")
        with pytest.raises(UsoflowError) as caught:
            check_writable(tmp_path / output)
        assert code_of(caught) == "output_unwritable"

    def test_missing_picture(self, tmp_path: Path) -> None:
        (tmp_path / "here-in").mkdir()
        with pytest.raises(UsoflowError, match=r"nothing\.png.*here-in") as error:
            find_folders(inputs=tmp_path / "here-in").picture("input", "nothing.png")
        assert code_of(error) == "image_missing"


class TestNames:
    @pytest.mark.parametrize("name", ESCAPES)
    def test_escapes_are_refused(self, tmp_path: Path, name: str) -> None:
        touch(tmp_path / "a.png")
        folders = find_folders(models=tmp_path, inputs=tmp_path / "here")
        for look in (folders.model, folders.picture):
            with pytest.raises(UsoflowError) as error:
                look("vae" if look == folders.model else "input", name)
            assert code_of(error) == "path_outside"
        assert not folders.exists("input", name)

    @pytest.mark.parametrize("name", ["x" * 300 + ".png", "x/" * 3000, "\ud800.png", "", ".", "a.png/b"])
    def test_names_that_no_file_can_have(self, tmp_path: Path, name: str) -> None:
        touch(tmp_path / "a.png")
        folders = find_folders(inputs=tmp_path)
        assert not folders.exists("input", name)
        with pytest.raises(UsoflowError) as error:
            folders.picture("input", name)
        assert code_of(error) == "image_missing"

    @pytest.mark.parametrize("name", ["x" * 240, "猫" * 80, "a/" + "x" * 240, "%date%"])
    def test_names_of_pictures_that_fit(self, name: str) -> None:
        check_prefix(name)

    @pytest.mark.parametrize(
        ("name", "code"),
        [("x" * 241, "prompt_invalid"), ("猫" * 81 + "/a", "prompt_invalid"), ("../a", "path_outside")],
    )
    def test_names_of_pictures_that_do_not(self, name: str, code: str) -> None:
        with pytest.raises(UsoflowError) as caught:
            check_prefix(name)
        assert code_of(caught) == code

    @given(name=st.text(st.sampled_from("./\\:\0 ~a$%") | st.characters(), max_size=20))
    def test_what_is_found_lies_inside(self, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
        root = tmp_path_factory.getbasetemp() / "names"
        touch(root / "secret.png")
        touch(root / "in/a")
        try:
            path = find_folders(inputs=root / "in").picture("input", name)
        except UsoflowError as error:
            code = error.code
        else:
            code = "" if path.resolve().is_relative_to((root / "in").resolve()) else "outside!"
        assert code in ("", "image_missing", "path_outside")

    @given(
        parts=st.lists(st.text(string.ascii_letters + " _-.", min_size=1, max_size=9), min_size=1, max_size=3)
    )
    def test_ordinary_names_are_found(
        self, tmp_path_factory: pytest.TempPathFactory, parts: list[str]
    ) -> None:
        assume(not any(part.strip(".") == "" for part in parts))
        root = tmp_path_factory.mktemp("ordinary")
        file = touch(root.joinpath(*parts))
        assert find_folders(inputs=root).picture("input", "/".join(parts)) == file
        assert find_folders(inputs=root).picture("input", "\\".join(parts)) == file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("6.5 gb", 6_500_000_000),
        ("512M", 512 * 10**6),
        ("7GiB", 7 * 2**30),
        ("123k", 123_000),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize(
    "text", ["8Gi", "", "GB", "-1GB", "eight", "0GB", "0.0001K", "8 GB GB", "8", "8B", "9" * 400 + "GB"]
)
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsoflowError) as caught:
        bytes_of(text)
    assert caught.value.code == "budget_invalid"


@pytest.mark.parametrize(
    ("named", "there", "advice"),
    [
        ("models/checkpoints", "models/checkpoints", "models"),
        ("", "ComfyUI/models/checkpoints", "ComfyUI"),
        ("", "model_index.json", "single files"),
    ],
)
def test_a_folder_beside_the_models_folder_is_told(
    tmp_path: Path, named: str, there: str, advice: str
) -> None:
    """All of the tutorial's files would seem to be missing, and be downloaded to where nobody finds them."""
    if there.endswith(".json"):
        (tmp_path / there).write_text("{}")
    else:
        (tmp_path / there).mkdir(parents=True)
    with pytest.raises(UsoflowError) as caught:
        find_folders(models=tmp_path / named)
    assert caught.value.code == "settings_invalid"
    assert advice in caught.value.remedy
    (tmp_path / "empty").mkdir()
    find_folders(models=tmp_path / "empty")  # downloads may go there

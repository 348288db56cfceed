"""Drawings are those of the versions that were trained with, and a damaged archive is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from discs import WORLD
from usoflow.errors import UsoflowError
from usoflow.training.drawings import VERSIONS, DrawingSet, fetch

ICONS = {
    "icons": {"frog": {"body": "<g/>"}},
    "aliases": {"green-frog": {"parent": "frog"}},
    "width": 32,
    "height": 32,
}


def packed(path: Path, name: str, text: str) -> None:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text.encode()))


def test_an_archive_is_read_and_aliases_followed(tmp_path: Path) -> None:
    packed(tmp_path / "a.tgz", "package/icons.json", json.dumps(ICONS))
    drawings = DrawingSet.read(tmp_path / "a.tgz", "noto")
    assert drawings.svg("green-frog") == drawings.svg("frog")
    assert 'viewBox="0 0 32 32"' in drawings.svg("frog")
    with pytest.raises(UsoflowError, match="no drawing of toad"):
        drawings.svg("toad")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    packed(tmp_path / "whole.tgz", "package/icons.json", json.dumps(ICONS))
    whole = (tmp_path / "whole.tgz").read_bytes()
    packed(tmp_path / "other.tgz", "package/else.json", "{}")
    packed(tmp_path / "broken.tgz", "package/icons.json", '{"icons": ')
    (tmp_path / "short.tgz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.tgz").write_text("<html>")
    for name in ("other", "broken", "short", "page"):
        with pytest.raises(UsoflowError, match=f"{name}.tgz cannot be read") as error:
            DrawingSet.read(tmp_path / f"{name}.tgz", "noto")
        assert "Delete it" in error.value.remedy


def test_only_missing_versions_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for npm writes what it is asked for; of a set, another version does not count."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        "#!/bin/sh\nspec=${3#@}\nname=${spec%@*}; version=${spec#*@}\n"
        'echo "$spec" >> "$ASKED"\necho > "$(echo "$name" | tr / -)-$version.tgz"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    drawn = tmp_path / "npm"
    drawn.mkdir()
    first, second, *others = WORLD.sets
    (drawn / f"iconify-json-{first}-{VERSIONS[first]}.tgz").touch()
    (drawn / f"iconify-json-{second}-99.0.0.tgz").touch()
    fetch(WORLD, drawn)
    asked = (tmp_path / "asked").read_text().split()
    assert asked == [f"iconify-json/{name}@{VERSIONS[name]}" for name in (second, *others)]
    assert {f"iconify-json-{name}-{VERSIONS[name]}.tgz" for name in WORLD.sets} <= {
        path.name for path in drawn.iterdir()
    }


def test_a_failing_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho E404 no such package >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UsoflowError, match="E404 no such package"):
        fetch(WORLD, tmp_path / "drawings")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UsoflowError, match=r"npm pack .* failed"):
        fetch(WORLD, tmp_path / "drawings")

"""The tutorial's files from Hugging Face: continued where a download broke off, verified, put in place."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import certifi

from usoflow.api.workflow import free_name
from usoflow.catalogue import KnownFile
from usoflow.durable import sha256
from usoflow.errors import UsoflowError
from usoflow.file_lock import taken
from usoflow.models.checkpoint import TensorFile
from usoflow.settings import Folders

STAGING: Final = ".download"  # within a model folder, on its disk; what is half there stays, to be continued
_URL_PATH = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/main/(?P<file>.+)$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_BLOCK: Final = 1 << 20
PARTIAL_CONTENT: Final = 206
TIMEOUT: Final = 60  # seconds without a byte

Progress = Callable[[int, int], None]


def pull(file: KnownFile, folders: Folders, progress: Progress = lambda done, total: None) -> Path:
    """Download a file into its folder.

    `HF_ENDPOINT` names another hub, `HF_TOKEN` who asks. A sound file that has the name is kept under another
    one: it holds something else.

    Args:
        file: what to get.
        folders: where it goes.
        progress: is told how many bytes of how many are there.

    Raises:
        UsoflowError: `download_failed`; `output_unwritable` if there is no room; `model_damaged` or
            `model_kind` if it is not what was asked for.
    """
    match = _URL_PATH.match(urlparse(file.url).path)
    assert match is not None
    target = folders.models[file.folder][0] / file.name
    source = _source(match["repo"], match["file"])
    part = target.parent / STAGING / f"{file.name}.{source.etag[:16]}.part"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _require_room(part, source)
        with _held(file.name, part):
            _fetch(file.name, source, part, progress)
            _verify(file, source, part)
            if kept := name_to_keep(target):
                target.rename(kept)
            part.replace(target)
        for old in part.parent.glob(f"{file.name}.*.part"):  # of what the hub had before
            old.unlink()
    except OSError as error:
        raise UsoflowError(
            "output_unwritable", f"{error.filename or part.parent}: {error.strerror or error}"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # what is half there lies in it, or others'
            part.parent.rmdir()
    return target


def name_to_keep(target: Path) -> Path | None:
    """Where the file that a download would replace is put; None if there is none, or it is damaged."""
    try:
        TensorFile.open(target)
    except UsoflowError:
        return None
    return target.with_name(free_name(target.name, os.listdir(target.parent)))


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a file is, after redirects; its size and the hub's checksum (of large files: sha256)."""

    url: str
    headers: dict[str, str]
    size: int
    etag: str


def _source(repo: str, name: str) -> _Source:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repo, name)
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        metadata = get_hf_file_metadata(url)
    except Exception as error:  # which classes there are depends on the version of the library
        reason = str(error).strip().split("\n")[0]
        raise UsoflowError("download_failed", f"{url}: {reason}", remedy=_remedy(repo, error)) from None
    own = urlparse(metadata.location).netloc == urlparse(url).netloc
    headers = build_hf_headers() if own else {}  # a token is no business of the server behind a redirect
    return _Source(metadata.location, headers, metadata.size or 0, metadata.etag or "")


def _remedy(repo: str, error: Exception) -> str | None:
    """What to do where the hub itself refuses; None where the network may be the reason."""
    page, kinds = f"https://huggingface.co/{repo}", {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"Agree to the licence at {page}, make a token in your settings there, and set HF_TOKEN to it."
    if kinds & {"EntryNotFoundError", "RepositoryNotFoundError"}:
        return f"See {page} for where the file is now; a mirror that HF_ENDPOINT names may lack it."
    return None


def _require_room(part: Path, source: _Source) -> None:
    lacking, free = source.size - _size(part), shutil.disk_usage(part.parent).free
    if lacking > free:
        raise UsoflowError(
            "output_unwritable",
            f"{part.parent}: {lacking / 1e9:.1f} GB are to come, and there is room for {free / 1e9:.1f}.",
            remedy="Make room, or let the folder be a link to one on a larger disk.",
        )


@contextlib.contextmanager
def _held(name: str, part: Path) -> Iterator[None]:
    """Keep others from appending to the same part meanwhile, where system and disk have locks for that."""
    if sys.platform == "win32":  # where a file that is open cannot be put in place, either
        yield
        return
    with part.open("ab") as stream:
        try:
            ours = taken(stream.fileno())
        except OSError:  # no locks here
            ours = True
        if not ours:
            what, advice = f"{name}: another download of it is running.", "Wait until that one has ended."
            raise UsoflowError("download_failed", what, remedy=advice)
        yield


def _fetch(name: str, source: _Source, part: Path, progress: Progress) -> None:
    """Append what is missing, beginning again where a connection breaks, as long as more is there then."""
    while (before := _size(part)) < source.size or not before:
        ending: Exception | None = None
        try:
            for block in _blocks(source, part):
                with part.open("ab") as stream:  # what is wrong with the disk is no matter of the network
                    stream.write(block)
                progress(_size(part), source.size)
        except _ConnectionError as error:
            ending = error
        if _size(part) <= before:
            raise UsoflowError("download_failed", f"{name}: {ending or 'the connection ends without data'}")


class _ConnectionError(Exception):
    """A connection that could not be made, or ended early."""


def _trusted() -> ssl.SSLContext:
    """Whom the system trusts (SSL_CERT_FILE), and whom Mozilla does: some Pythons know of no system's."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _blocks(source: _Source, part: Path) -> Iterator[bytes]:
    """What comes of a file beyond the part that is there, which is emptied if all of it comes."""
    begin = _size(part)
    headers = source.headers | ({"Range": f"bytes={begin}-"} if begin else {})
    try:
        answer = urlopen(Request(source.url, headers=headers), timeout=TIMEOUT, context=_trusted())
    except (OSError, HTTPException) as error:
        raise _ConnectionError(error) from None
    with answer:
        if answer.status != PARTIAL_CONTENT:
            part.write_bytes(b"")
        while True:
            try:
                block = answer.read(_BLOCK)
            except (OSError, HTTPException) as error:
                raise _ConnectionError(error) from None
            if not block:
                return
            yield block


def _verify(file: KnownFile, source: _Source, part: Path) -> None:
    """What is wrong is removed, so that the next download begins anew."""
    try:
        if _SHA256.match(source.etag) and sha256(part) != source.etag:
            raise UsoflowError("model_damaged", f"{file.name} is not what the hub has: its checksum differs.")
        arrived = TensorFile.open(part)
        if not file.holds <= set(arrived.components()):
            raise UsoflowError("model_kind", f"{file.url} holds {arrived.describe()}.")
    except UsoflowError:
        part.unlink()
        raise


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

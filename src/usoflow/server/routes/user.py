"""`/users`, `/settings`, `/userdata`: what the editor keeps for its user. There is one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from usoflow.api.saving import is_partial, write_whole
from usoflow.errors import UsoflowError
from usoflow.file_names import can_be_told
from usoflow.server.context import Json, Server, ServerOf
from usoflow.server.files import within, writing
from usoflow.server.routes.body import AnyBody, ObjectBody
from usoflow.server.sending import file_answer

router = APIRouter(tags=["user"])

STYLE = "user.css"
# What the editor asks for at its start and would report as missing.
FIRST_FILES = {STYLE: b"", "comfy.templates.json": b"[]"}
FIRST_FOLDERS = ("workflows", "subgraphs")
# What is of a browser, not of the user: one that has no graph to show yet would open the editor's own
# example, whose models and nodes are not here, instead of the templates.
OF_A_BROWSER = "Comfy.TutorialCompleted"


def prepare(folder: Path) -> None:
    """Make a new user's folder."""
    for name in FIRST_FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, data in FIRST_FILES.items():
        if not (folder / name).exists():
            write_whole(folder / name, data)


@router.get("/users")
def users() -> Json:
    """Everything is kept here, not in the browser."""
    return {"storage": "server", "migrated": True}


@router.get("/settings")
def settings(server: ServerOf) -> Json:
    """All settings of the editor."""
    return {key: value for key, value in server.store.settings().items() if key != OF_A_BROWSER}


@router.get("/settings/{key:path}")
def setting(server: ServerOf, key: str) -> Any:
    """One setting; null if it was never set."""
    return JSONResponse(server.store.settings().get(key))


@router.post("/settings")
def set_settings(server: ServerOf, body: ObjectBody) -> Response:
    """Set some."""
    server.store.set_settings(body)
    return Response()


@router.post("/settings/{key:path}")
def set_setting(server: ServerOf, key: str, body: AnyBody) -> Response:
    """Set one; the body is the value."""
    server.store.set_settings({key: body})
    return Response()


@router.get("/userdata")
def list_files(
    server: ServerOf, dir: str = "", recurse: str = "", split: str = "", full_info: str = ""
) -> JSONResponse:
    """The files of a folder; with `full_info` as objects, with `split` as lists of path parts."""
    root = within(server.settings.user_folder, dir)
    if not dir:
        raise UsoflowError("body_invalid", "The query has no dir.")
    if not os.path.isdir(root):
        raise UsoflowError("file_not_found", f"There is no folder {dir!r}.")
    found = root.rglob("*") if recurse == "true" else root.glob("*")
    paths = sorted(path for path in found if _is_listed(path, root))
    if full_info == "true":
        return JSONResponse(list(_infos(paths, root)))
    names = [path.relative_to(root).as_posix() for path in paths]
    return JSONResponse([[name, *name.split("/")] for name in names] if split == "true" else names)


@router.post("/userdata/{file:path}/move/{target:path}")
async def move(
    server: ServerOf, request: Request, file: str, target: str, overwrite: str = "true", full_info: str = ""
) -> JSONResponse:
    """Give a file another name."""
    # Slashes of a name may be escaped, those of the route are not: a folder can be called "move".
    given, moves, wanted = request.scope["raw_path"].decode("latin-1").rpartition("/move/")
    if not moves:
        return await write(server, request, f"{file}/move/{target}", overwrite, full_info)
    file, target = unquote(given.partition("/userdata/")[2]), unquote(wanted)

    def give() -> JSONResponse:
        source, path = _existing(server, file), within(server.settings.user_folder, target)
        with writing(repr(target)):
            _check_free(path, overwrite)
            path.parent.mkdir(parents=True, exist_ok=True)
            source.replace(path)
        return _written(server, path, full_info)

    return await run_in_threadpool(give)


@router.get("/userdata/{file:path}")
def read(server: ServerOf, request: Request, file: str) -> Response:
    """A file; only the style sheet is more than data to a browser."""
    kind = "text/css" if file == STYLE else "application/octet-stream"
    return file_answer(request, _existing(server, file), media_type=kind)


@router.get("/user.css")
def style(server: ServerOf, request: Request) -> Response:
    """The user's style sheet."""
    return read(server, request, STYLE)


@router.post("/userdata/{file:path}")
async def write(
    server: ServerOf, request: Request, file: str, overwrite: str = "true", full_info: str = ""
) -> JSONResponse:
    """Write a file; the body is its content."""
    path = within(server.settings.user_folder, file)
    body = await request.body()

    def keep() -> JSONResponse:
        with writing(repr(file)):
            _check_free(path, overwrite)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, body)
        return _written(server, path, full_info)

    return await run_in_threadpool(keep)  # sockets do not wait for the disk


@router.delete("/userdata/{file:path}", status_code=204)
def delete(server: ServerOf, file: str) -> None:
    """Delete a file."""
    path = _existing(server, file)
    with writing(repr(file)):
        path.unlink()


def _is_listed(path: Path, root: Path) -> bool:
    """Whether it is a file whose name can be told, and not what a save that was interrupted has left."""
    name = path.relative_to(root).as_posix()
    return can_be_told(name) and not is_partial(path) and os.path.isfile(path)


def _existing(server: Server, name: str) -> Path:
    path = within(server.settings.user_folder, name)
    if not os.path.isfile(path):
        raise UsoflowError("file_not_found", f"There is no {name!r}.")
    return path


def _check_free(path: Path, overwrite: str) -> None:
    if path.is_dir() or (overwrite == "false" and path.exists()):
        raise UsoflowError("file_exists", f"There is a {path.name!r} already.")


def _written(server: Server, path: Path, full_info: str) -> JSONResponse:
    root = server.settings.user_folder.resolve()
    return JSONResponse(_info(path, root) if full_info == "true" else path.relative_to(root).as_posix())


def _infos(paths: Iterable[Path], root: Path) -> Iterator[Json]:
    for path in paths:
        with suppress(FileNotFoundError):  # deleted meanwhile
            yield _info(path, root)


def _info(path: Path, root: Path) -> Json:
    state = path.stat()
    name = path.relative_to(root).as_posix()
    return {"path": name, "size": state.st_size, "modified": state.st_mtime, "created": state.st_ctime}

"""The official editor, unmodified, from its own package; and the files of its template browser."""

from __future__ import annotations

import importlib.util
import mimetypes
import re
from pathlib import Path
from typing import Final

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from usoflow.api.at_hand import at_hand
from usoflow.api.official import TEMPLATE, adapted
from usoflow.errors import UsoflowError
from usoflow.server import picture
from usoflow.server.context import ServerOf
from usoflow.server.templates import read
from usoflow.workflow.loading import template

EDITOR: Final = "comfyui_frontend_package"
THUMBNAIL: Final = ".webp"
NOT_INSTALLED: Final = (
    'The editor is not installed: pip install "usoflow[ui]". The API is there, see /docs.\n'
)
# Windows' registry may call scripts plain text, and then browsers do not run them.
TYPES: Final = {
    ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".json": "application/json",
    ".svg": "image/svg+xml", ".wasm": "application/wasm",
}  # fmt: skip
TURNED_OFF: Final = "The editor is not served because of --no-ui. The API is there, see /docs.\n"

router = APIRouter(tags=["editor"])


@router.get("/templates/{name}")
def template_file(server: ServerOf, name: str) -> Response:
    """An index (`index.json`, `index.fr.json`), a template, or its thumbnail."""
    if name.endswith(THUMBNAIL):
        template(re.sub(r"-\d+$", "", name.removesuffix(THUMBNAIL)))  # there must be one
        return Response(picture.thumbnail(name), media_type="image/webp")
    stem = name.removesuffix(".json")
    if stem == name:
        raise UsoflowError("template_unknown", f"There is no {name!r}.")
    if stem == "index_logo":
        return JSONResponse(read(name))
    if re.fullmatch(r"index(\.[\w-]+)?", stem):
        return JSONResponse(server.templates.index(name))
    # The tutorial's own with the files that are there, so that it runs with our small models, too.
    return JSONResponse(adapted(at_hand(server.folders)) if stem == TEMPLATE else template(stem))


@router.get("/extensions")
def extensions() -> list[str]:
    """The scripts that the editor is made of."""
    root = editor_folder()
    found = sorted((root / "extensions" / "core").glob("*.js")) if root else []
    return [f"/{path.relative_to(root).as_posix()}" for path in found if root]


def editor_folder() -> Path | None:
    """Where the editor's files are, if it is installed."""
    spec = importlib.util.find_spec(EDITOR)
    return Path(spec.origin).parent / "static" if spec and spec.origin else None


def mount_editor(app: FastAPI) -> None:
    """Serve the editor's files under every path that no route has."""
    root = editor_folder()
    if root is None:
        mount_notice(app, NOT_INSTALLED)
        return

    def page() -> FileResponse:
        return FileResponse(root / "index.html", headers={"Cache-Control": "no-cache"})

    for suffix, kind in TYPES.items():
        mimetypes.add_type(kind, suffix)
    app.add_api_route("/", page, include_in_schema=False)
    app.mount("/", StaticFiles(directory=root))


def mount_notice(app: FastAPI, text: str) -> None:
    """Say where the editor would be why it is not there."""
    app.add_api_route("/", lambda: Response(text, media_type="text/plain"), include_in_schema=False)

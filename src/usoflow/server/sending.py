"""Files as answers, sent only to who does not have them yet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from fastapi import Request
from fastapi.responses import FileResponse, Response
from starlette.datastructures import Headers
from starlette.staticfiles import NotModifiedResponse, StaticFiles

from usoflow.version import __version__

# A file is data: a browser neither runs nor frames it, whatever is in it, and asks whether it is still so.
HARMLESS: Final = {"Content-Security-Policy": "default-src 'none'; sandbox", "Cache-Control": "no-cache"}
_COMPARED: Final = StaticFiles()  # of no folder: it knows how If-None-Match and If-Modified-Since are read


def remade_answer(request: Request, path: Path, make: Callable[[], tuple[bytes, str]]) -> Response:
    """What `make` makes of a file, with its type; or 304 if the client has it, made of the file as it is."""
    state = path.stat()
    known = f"{__version__} {state.st_mtime_ns} {state.st_size} {request.url.query}".encode()
    headers = Headers({**HARMLESS, "ETag": f'"{hashlib.sha256(known).hexdigest()}"'})
    if _COMPARED.is_not_modified(headers, request.headers):
        return NotModifiedResponse(headers)
    data, kind = make()
    return Response(data, media_type=kind, headers=headers)


def file_answer(
    request: Request,
    path: Path,
    *,
    media_type: str,
    filename: str | None = None,
    disposition: Literal["attachment", "inline"] = "attachment",
) -> Response:
    """A file; or 304 if the client says that it has it as it is.

    With a `filename` a browser saves it under that, at once (`attachment`) or when it is asked to.
    """
    answer = FileResponse(
        path,
        media_type=media_type,
        headers=HARMLESS,
        filename=filename,
        stat_result=path.stat(),
        content_disposition_type=disposition,
    )
    unchanged = _COMPARED.is_not_modified(answer.headers, request.headers)
    return NotModifiedResponse(answer.headers) if unchanged else answer

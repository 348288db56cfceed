"""What went wrong as an answer: its status, and a body that ComfyUI's clients read."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from usoflow.errors import UsoflowError

logger = logging.getLogger(__name__)

RETRY_AFTER = 5  # seconds, while the queue is full or the server restarts

# Error codes that are not simply "400 Bad Request".
STATUS: Mapping[str, int] = {
    "queue_full": 429,
    "server_stopping": 503,
    "state_unusable": 503,
    "body_too_large": 413,
    "image_too_large": 413,  # of these two the editor shows no more than what the number means
    "image_invalid": 415,
    "save_failed": 507,
    "job_exists": 409,
    "file_exists": 409,
    "image_missing": 404,
    "file_not_found": 404,
    "job_unknown": 404,
    "template_unknown": 404,
}


def error_body(error: UsoflowError) -> dict[str, Any]:
    """An error in the form that ComfyUI's clients read.

    The remedy is in `details`, which they show, and in `extra_info`, where every error has it: those of a
    prompt have ComfyUI's own details.
    """
    record = {"type": error.code, "message": error.detail, "details": error.remedy}
    return {"error": {**record, "extra_info": {"remedy": error.remedy}}, "node_errors": {}}


def add_answers(app: FastAPI) -> None:
    """Whatever a route raises is answered so."""
    app.add_exception_handler(UsoflowError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UsoflowError)
    if request.url.path.startswith("/upload/"):  # the editor tells its user little more than "Upload failed"
        logger.info("An upload was refused: %s %s", error.detail, error.remedy)
    status = STATUS.get(error.code, 400)
    headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else None
    return JSONResponse(error_body(error), status, headers)


def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A query or form value of the wrong kind."""
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return JSONResponse(error_body(UsoflowError("body_invalid", wrong)), 400)


def _answer_http(request: Request, error: Exception) -> JSONResponse:
    """No such route or file of the editor, a method that a route lacks, a form that cannot be read."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, UsoflowError):  # a form that was too large, say
        return _answer_error(request, error.__cause__)
    if isinstance(error.__cause__, OSError):  # a large form waits in a file
        return _answer_error(request, _form_not_kept(error.__cause__))
    absent = error.status_code in (404, 405)
    detail = f"There is no {request.method} {request.url.path}." if absent else str(error.detail)
    code = "file_not_found" if error.status_code == 404 else "body_invalid"
    body = error_body(UsoflowError(code, detail, remedy="See /docs of the server."))
    return JSONResponse(body, error.status_code, error.headers)


def _form_not_kept(error: OSError) -> UsoflowError:
    what = f"An upload cannot be written to {tempfile.gettempdir()}: {error.strerror}."
    return UsoflowError("save_failed", what, remedy="Make room there, or name another folder with TMPDIR.")


def _answer_nobody(request: Request, error: Exception) -> Response:
    """Whoever has left while sending a body is no defect, which would be logged."""
    return Response(status_code=400)

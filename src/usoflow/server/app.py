"""The application: routes around a store, a supervisor and an engine, started and stopped together."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from usoflow.errors import UsoflowError
from usoflow.nodes import registry
from usoflow.server import docs, socket, ui
from usoflow.server.context import STATUS, Server, ServerSettings, error_body
from usoflow.server.guard import Guard
from usoflow.server.hub import Hub, Outgoing
from usoflow.server.log import LogBuffer
from usoflow.server.messages import messages_of
from usoflow.server.routes import catalogue, jobs, pictures, prompt, system, user
from usoflow.server.templates import Templates
from usoflow.service.engine import Engine
from usoflow.service.jobs import FINAL, State
from usoflow.service.lock import hold
from usoflow.service.process import WorkerProcess
from usoflow.service.store import JobStore
from usoflow.service.supervisor import Event, Running, Supervisor
from usoflow.service.worker import WorkerSettings

logger = logging.getLogger(__name__)

DECODED_AT_ONCE = 2  # pictures
RETRY_AFTER = 5  # seconds, while the queue is full or the server restarts


def create_app(
    settings: ServerSettings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    budget: int | None = None,
    compiled: bool | None = None,
) -> FastAPI:
    """The application with a worker process of its own.

    Raises:
        UsoflowError: `state_in_use`, `state_unusable`.
    """
    settings = settings.with_inputs(settings.examples)
    worker = WorkerSettings(
        settings.folders, settings.jobs_file, device, dtype, budget, settings.custom_nodes, compiled
    )
    with ExitStack() as opened:
        lock = hold(settings.state / "lock")
        opened.callback(os.close, lock)
        inherited = [lock] if os.name == "posix" else []  # elsewhere Popen takes none
        app = assemble(settings, JobStore(settings.jobs_file), WorkerProcess(worker, inherited=inherited))
        app.state.server.opened = opened.pop_all()
    return app


def assemble(settings: ServerSettings, store: JobStore, engine: Engine) -> FastAPI:
    """The application around any engine."""
    user.prepare(settings.user_folder)
    server = _server(settings, store, engine)
    app = FastAPI(
        title="usoflow", description="ComfyUI's API.", lifespan=_lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = server
    routers = [module.router for module in (prompt, jobs, catalogue, pictures, user, system, socket, ui)]
    for router in routers:
        app.include_router(router)
    docs.mount_docs(app, routers)
    app.add_exception_handler(UsoflowError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    if settings.ui:
        ui.mount_editor(app)
    else:
        ui.mount_notice(app, ui.TURNED_OFF)
    app.add_middleware(Guard, settings=settings)
    return app


def _server(settings: ServerSettings, store: JobStore, engine: Engine) -> Server:
    hub, nodes = Hub(), registry()

    def listen(running: Running, event: Event) -> None:
        client = running.job.client
        messages = [] if client is None else list(messages_of(running, event))

        def publish(some: Sequence[Outgoing]) -> None:
            for message in some:
                hub.publish_soon(message, client)

        if event in FINAL:  # in ComfyUI's order: how the job ended, the queue, that nothing runs
            server.queue_changed(before=lambda: publish(messages[:1]))
            publish(messages[1:])
            return
        if isinstance(event, State):
            server.queue_changed()
        publish(messages)

    supervisor = Supervisor(store, engine, listen, preview=settings.preview)
    server = Server(
        settings, store, engine, nodes, hub, supervisor, Templates(nodes), LogBuffer(hub.log_soon)
    )
    return server


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    server: Server = app.state.server
    server.hub.open()
    server.decoding = CapacityLimiter(DECODED_AT_ONCE)
    with server.log.attached():
        server.supervisor.start()
        yield
        await run_in_threadpool(server.supervisor.stop)
    server.store.close()
    server.opened.close()


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

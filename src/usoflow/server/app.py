"""The application: routes around a store, a supervisor and an engine, started and stopped together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from usoflow.nodes import registry
from usoflow.server import docs, socket, ui
from usoflow.server.context import Server, ServerSettings
from usoflow.server.errors import add_answers
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

DECODED_AT_ONCE = 2  # pictures


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
    add_answers(app)
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

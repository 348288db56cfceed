"""`/system_stats`, `/features`, health, metrics, the log, and what usoflow has nothing to say to."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import anyio
import psutil
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.concurrency import run_in_threadpool

from usoflow.server.context import Json, Server, ServerOf
from usoflow.server.routes.body import ObjectBody
from usoflow.server.ui import EDITOR
from usoflow.service.engine import Engine
from usoflow.service.jobs import State
from usoflow.version import __version__
from usoflow.workflow.loading import TEMPLATE_PACKAGE

router = APIRouter(tags=["system"])

COMFYUI_VERSION = "0.8.0"  # whose API this is: the editor and scripts ask for at least some version
VERSIONS: Final = {  # of which package
    "required_frontend_version": EDITOR,
    "installed_templates_version": TEMPLATE_PACKAGE,
    "required_templates_version": TEMPLATE_PACKAGE,
}

PATIENCE = 10.0  # seconds that a worker gets to tell what it computes with
PERIOD = 0.05


def features(server: Server) -> Json:
    """What the server can do, as clients are told."""
    return {"supports_preview_metadata": True, "max_upload_size": server.settings.limits.body}


@router.get("/features")
def get_features(server: ServerOf) -> Json:
    """What the server can do."""
    return features(server)


@router.get("/system_stats")
async def system_stats(server: ServerOf) -> Json:
    """The machine and the device that computes; waits a little for a worker that is just starting."""
    device = await _computing(server.engine)
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    return {
        "system": {
            "os": sys.platform,
            "ram_total": total,
            "ram_free": free,
            "comfyui_version": COMFYUI_VERSION,
            **_versions(),
            "python_version": sys.version,
            "pytorch_version": device.get("pytorch_version", "not loaded yet"),
            "embedded_python": False,
            "argv": [f"usoflow-{__version__}", "serve"],  # which the editor puts into reports
        },
        "devices": [_device(device, total, free)],
    }


@cache
def _versions() -> Mapping[str, str]:
    """Of the editor and its templates, which fit each other; without what is not installed."""
    found = {}
    for name, package in VERSIONS.items():
        with suppress(PackageNotFoundError):
            found[name] = version(package)
    return found


async def _computing(engine: Engine) -> Mapping[str, Any]:
    """Waits in no thread: there are few, and many may ask."""
    if not engine.fault():
        await run_in_threadpool(engine.start)
    deadline = time.monotonic() + PATIENCE
    while not (found := engine.system()) and not engine.fault() and time.monotonic() < deadline:
        await anyio.sleep(PERIOD)
    return found


def _device(device: Any, total: int, free: int) -> Json:
    memory = {"vram_total": device.get("vram_total", total), "vram_free": device.get("vram_free", free)}
    torch = {f"torch_{name}": value for name, value in memory.items()}
    name, kind = device.get("name", platform.machine()), device.get("type", "cpu")
    return {"name": name, "type": kind, "index": device.get("index"), **memory, **torch}


@router.get("/health/live")
async def live() -> Json:
    """The server answers."""
    return {"live": True}


@router.get("/health/ready")
async def ready(server: ServerOf) -> JSONResponse:
    """Whether jobs are taken, and can be run."""
    fault = server.engine.fault()
    able = server.supervisor.alive and not fault
    return JSONResponse({"ready": able} | ({"reason": fault} if fault else {}), 200 if able else 503)


@router.get("/metrics")
def metrics(server: ServerOf) -> Response:
    """For Prometheus: jobs by state, connections."""
    registry = CollectorRegistry()
    jobs = Gauge("usoflow_jobs", "Jobs in the table by state.", ["state"], registry=registry)
    for state in State:
        jobs.labels(state).set(server.store.count([state]))
    Gauge("usoflow_sockets", "Open WebSocket connections.", registry=registry).set(len(server.hub))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/i18n")
@router.get("/global_subgraphs")
@router.get("/workflow_templates")
@router.get("/node_replacements")
def nothing() -> Json:
    """Custom nodes would add to this."""
    return {}


@router.get("/internal/logs")
def log_text(server: ServerOf) -> str:
    """The log as a text."""
    return "".join(entry["m"] for entry in server.log.entries)


@router.get("/internal/logs/raw")
def logs(server: ServerOf) -> Json:
    """The log line by line, for a console of this size."""
    return {"entries": server.log.entries, "size": {"cols": 120, "rows": 40}}


@router.patch("/internal/logs/subscribe")
async def subscribe_to_logs(server: ServerOf, body: ObjectBody) -> Response:
    """Send the log to a client's `/ws`, or no more: `{"enabled": true, "clientId": "..."}`."""
    server.hub.want_logs(str(body.get("clientId", "")), body.get("enabled") is True)
    return Response()

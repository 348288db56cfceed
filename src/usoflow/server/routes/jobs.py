"""`/jobs`: what the editor's queue and history panels show."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from usoflow.errors import UsoflowError
from usoflow.server.context import Json, Server, ServerOf
from usoflow.server.messages import history_entry
from usoflow.server.routes.body import ObjectBody, names
from usoflow.service.jobs import FINAL, WAITING, Job, State, pictures

router = APIRouter(tags=["jobs"])

MAX_PAGE = 1000
DURATIONS = ("execution_time", "execution_duration")  # what clients call how long a job ran


@router.get("/jobs")
def jobs(
    server: ServerOf,
    status: str = "",
    limit: int = Query(default=MAX_PAGE, ge=1),
    offset: int = Query(default=0, ge=0, le=2**31),
    sort_by: str = "create_time",
    sort_order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    """A page of jobs in some states (default: all), the newest first.

    By `sort_by=execution_time` those that ran longest are first. Who has cleared the queue does not want to
    see what was in it: jobs that were cancelled before they began are in no list, only at `/jobs/ID`.
    """
    names_ = [name for name in status.split(",") if name]
    unknown = sorted(set(names_) - set(State))
    if unknown:  # a text, as ComfyUI answers it
        wrong = f"Invalid status value(s): {', '.join(unknown)}. Valid values: {', '.join(State)}"
        return JSONResponse({"error": wrong}, 400)
    states = [State(name) for name in names_] or [*WAITING, *FINAL]
    limit = min(limit, MAX_PAGE)
    found = server.store.jobs(
        states,
        limit=limit,
        offset=offset,
        descending=sort_order == "desc",
        by_duration=sort_by in DURATIONS,
        unbegun=False,
    )
    total = server.store.count(states, unbegun=False)
    more = offset + len(found) < total
    page = {"offset": offset, "limit": limit, "total": total, "has_more": more}
    return JSONResponse({"jobs": [summary(job) for job in found], "pagination": page})


@router.get("/jobs/{job_id}")
def job_details(server: ServerOf, job_id: str) -> JSONResponse:
    """A job with its outputs and workflow."""
    job = server.store.get(job_id)
    request = server.store.request(job_id)
    if job is None or request is None:
        raise _no_job(job_id)
    details = summary(job) | {
        "outputs": job.outputs,
        "workflow": {"prompt": request.prompt, "extra_data": request.extra},
    }
    if job.state in FINAL:
        details["execution_status"] = history_entry(job, [])["status"]
    return JSONResponse(details)


@router.post("/jobs/cancel")
def cancel_many(server: ServerOf, body: ObjectBody) -> Json:
    """Stop jobs, waiting or running: `{"job_ids": [...]}`."""
    wanted = names(body, "job_ids")
    return {"cancelled": [job_id for job_id in wanted if _cancel(server, job_id)]}


@router.post("/jobs/{job_id}/cancel")
def cancel(server: ServerOf, job_id: str) -> Json:
    """Stop a job, waiting or running."""
    if server.store.get(job_id) is None:
        raise _no_job(job_id)
    return {"cancelled": _cancel(server, job_id)}


def _no_job(job_id: str) -> UsoflowError:
    return UsoflowError("job_unknown", f"There is no job {job_id}.")


def _cancel(server: Server, job_id: str) -> bool:
    done = bool(server.store.cancel_pending([job_id])) or server.supervisor.interrupt(job_id)
    server.queue_changed()
    return done


def summary(job: Job) -> Json:
    """A job in a list."""
    images = [
        {**image, "nodeId": node, "mediaType": "images"}
        for node, shown in job.outputs.items()
        for image in pictures(shown)
    ]
    record: dict[str, Any] = {
        "id": job.id,
        "status": job.state,
        "priority": job.place,
        "create_time": job.created,
        "execution_start_time": job.started,
        "execution_end_time": job.ended,
        "outputs_count": _count(job),
        "preview_output": _preview(images),
        "workflow_id": job.workflow,
        "execution_error": _with_time(job) if job.state == State.FAILED else None,
    }
    return {key: value for key, value in record.items() if value is not None}


def _count(job: Job) -> int:
    """How many things a job has shown: pictures, texts, whatever stands in a list."""
    lists = (shown for record in job.outputs.values() for shown in record.values())
    return sum(len(shown) for shown in lists if isinstance(shown, list))


def _preview(images: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last picture that is kept, else the last one that is shown."""
    kept = [image for image in images if image["type"] == "output"]
    return next(reversed(kept or images), None)


def _with_time(job: Job) -> Json:
    return {**(job.error or {}), "timestamp": job.ended}

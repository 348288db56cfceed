"""`/prompt`, `/queue`, `/history`, `/interrupt`, `/free`: jobs as ComfyUI's scripts know them."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from usoflow.api.checking import check_names
from usoflow.catalogue import missing_file_remedy
from usoflow.errors import UsoflowError
from usoflow.schema.validation import ValidationResult, validate
from usoflow.schema.values import error
from usoflow.server.context import Json, Server, ServerOf
from usoflow.server.hub import LONGEST_NAME
from usoflow.server.messages import history_entry
from usoflow.server.routes.body import AnyBody, ObjectBody, names
from usoflow.service.jobs import FINAL, WAITING, Job, Request, State
from usoflow.workflow.document import looks_like_workflow
from usoflow.workflow.prompt import looks_like_prompt

router = APIRouter(tags=["jobs"])

SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")  # of the editor's maker: never stored
MAX_PAGE = 10_000

WRAP: Final = 'Send it as {"prompt": ...}.'
CONVERT: Final = (
    "Convert it with `usoflow convert FILE`, or by Export (API) in the editor,"
    ' and send the result as {"prompt": ...}.'
)
OTHERWISE: Final = "Correct what node_errors names."
REMEDIES: Final = {  # of what is wrong with the prompt as a whole; message and details are ComfyUI's
    "no_prompt": 'Send {"prompt": ...}; `usoflow convert FILE` makes a prompt.',
    "invalid_prompt": "Use the nodes that /object_info lists, each with class_type and inputs.",
    "prompt_no_outputs": "Add or un-bypass a SaveImage or PreviewImage.",
    "too_many_nodes": "Make several prompts of it.",
}


@router.get("/prompt")
def queue_length(server: ServerOf) -> Json:
    """How many jobs wait or run."""
    return {"exec_info": {"queue_remaining": server.store.count(WAITING)}}


@router.post("/prompt")
async def submit(server: ServerOf, body: AnyBody) -> JSONResponse:
    """Accept a prompt, `{"prompt": {...}}`: once this has answered 200, the job is not lost."""
    if not isinstance(body, dict) or "prompt" not in body:
        return _refusal(_no_prompt(body), {})
    if looks_like_workflow(body["prompt"]):
        message = "Cannot execute because this is the editor's workflow, not a prompt."
        return _refusal(error("invalid_prompt", message, CONVERT, remedy=CONVERT), {})
    return await run_in_threadpool(_submit, server, body)


def _no_prompt(body: Any) -> Json:
    """What is sent instead, if that can be told."""
    details = "No prompt provided"
    if looks_like_workflow(body):
        details = f"This is the editor's workflow. {CONVERT}"
    elif looks_like_prompt(body):
        details = f"This is the prompt alone. {WRAP}"
    return error("no_prompt", "No prompt provided", details)


def _submit(server: Server, body: Json) -> JSONResponse:
    if not server.supervisor.alive:
        raise UsoflowError("server_stopping", "The server is stopping.")
    prompt, most = body["prompt"], server.settings.limits.nodes
    if isinstance(prompt, dict) and len(prompt) > most:
        return _refusal(
            error("too_many_nodes", f"A prompt may have {most} nodes", f"{len(prompt)} nodes"), {}
        )
    checked = _validate(server, body)
    if checked.error is not None:
        return _refusal(checked.error, checked.node_errors)
    check_names(checked)
    job = server.store.add(_request(body, checked), limit=server.settings.limits.queue)
    server.supervisor.wake()
    server.queue_changed()
    answer = {"prompt_id": job.id, "number": job.place, "node_errors": checked.node_errors}
    return JSONResponse(answer)


def _validate(server: Server, body: Json) -> ValidationResult:
    targets = body.get("partial_execution_targets")
    return validate(
        body["prompt"],
        server.registry,
        server.folders,
        targets=[str(target) for target in targets] if isinstance(targets, list) else None,
        remedy=lambda folder, name: missing_file_remedy(folder, name, server.folders),
    )


def _request(body: Json, checked: ValidationResult) -> Request:
    job_id, client, number = (body.get(key) for key in ("prompt_id", "client_id", "number"))
    if job_id is not None and not (isinstance(job_id, str) and re.fullmatch(r"[\w.-]{1,100}", job_id)):
        raise UsoflowError("body_invalid", "prompt_id is not made of letters, digits, '-', '_' and '.'.")
    if isinstance(client, str) and len(client) > LONGEST_NAME:
        raise UsoflowError("body_invalid", f"client_id has more than {LONGEST_NAME} characters.")
    extra = body.get("extra_data")
    kept = {k: v for k, v in extra.items() if k not in SECRETS} if isinstance(extra, dict) else {}
    return Request(
        id=job_id or str(uuid.uuid4()),
        prompt=checked.prompt,
        targets=checked.outputs,
        extra=kept,
        client=client if isinstance(client, str) else None,
        front=bool(body.get("front")),
        number=_number(number),
    )


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsoflowError("body_invalid", "number is not a number.")
    return number


def _refusal(reason: Json, node_errors: Json) -> JSONResponse:
    extra = {"remedy": REMEDIES.get(reason["type"], OTHERWISE), **reason["extra_info"]}
    return JSONResponse({"error": {**reason, "extra_info": extra}, "node_errors": node_errors}, 400)


@router.get("/queue")
def queue(server: ServerOf) -> StreamingResponse:
    """What runs and what waits."""
    waiting = server.store.waiting()

    def listed(state: State) -> Iterator[str]:
        found = (_queued(server, job) for job in waiting if job.state == state)
        return _joined(json.dumps(entry) for entry in found if entry)

    def parts() -> Iterator[str]:
        yield '{"queue_running": ['
        yield from listed(State.IN_PROGRESS)
        yield '], "queue_pending": ['
        yield from listed(State.PENDING)
        yield "]}"

    return _streamed(parts())


@router.post("/queue")
def change_queue(server: ServerOf, body: ObjectBody) -> Response:
    """Cancel jobs that wait: `{"delete": [ids]}` or `{"clear": true}`."""
    server.store.cancel_pending(None if body.get("clear") else names(body, "delete"))
    server.queue_changed()
    return Response()


@router.get("/history")
def history(
    server: ServerOf,
    max_items: int = MAX_PAGE,
    offset: Annotated[int, Query(le=2**31)] = -1,
) -> StreamingResponse:
    """Jobs that have run, as they ended: the last `max_items`, or those from `offset` on (0: the first)."""
    limit = min(max(max_items, 0), MAX_PAGE)
    if offset >= 0:
        jobs = server.store.run_jobs(limit=limit, offset=offset, descending=False)
    else:
        jobs = server.store.run_jobs(limit=limit)[::-1]

    def parts() -> Iterator[str]:
        yield "{"
        found = ((job, entry) for job in jobs if (entry := _queued(server, job)))
        yield from _joined(f"{json.dumps(j.id)}: {json.dumps(history_entry(j, entry))}" for j, entry in found)
        yield "}"

    return _streamed(parts())


@router.get("/history/{job_id}")
def history_of(server: ServerOf, job_id: str) -> Json:
    """One job that has run; empty if there is none, or it has not ended."""
    job = server.store.get(job_id)
    entry = _queued(server, job) if job and job.state in FINAL and job.started else None
    return {job_id: history_entry(job, entry)} if job and entry else {}


@router.post("/history")
def change_history(server: ServerOf, body: ObjectBody) -> Response:
    """Forget jobs: `{"delete": [ids]}` or `{"clear": true}`. Their pictures stay."""
    server.store.forget(None if body.get("clear") else names(body, "delete"))
    return Response()


@router.post("/interrupt")
def interrupt(server: ServerOf, body: ObjectBody) -> Response:
    """Stop the job that runs, if it is `prompt_id` or none is given."""
    job_id = body.get("prompt_id")
    if not isinstance(job_id, str | None):
        raise UsoflowError("body_invalid", "prompt_id is not a text.")
    server.supervisor.interrupt(job_id)
    return Response()


@router.post("/free")
def free(server: ServerOf, body: ObjectBody) -> Response:
    """Forget models before the next job; with `free_memory` results, too."""
    if body.get("unload_models") or body.get("free_memory"):
        server.engine.free(outputs=bool(body.get("free_memory")))
    return Response()


def _queued(server: Server, job: Job) -> list[Any] | None:
    """What `/queue` and `/history` list: number, id, prompt, extra data, outputs; None if the job is gone."""
    request = server.store.request(job.id)
    if request is None:
        return None
    extra = {**request.extra, "create_time": job.created}
    extra |= {"client_id": request.client} if request.client else {}
    return [job.place, job.id, request.prompt, extra, list(request.targets)]


def _streamed(parts: Iterable[str]) -> StreamingResponse:
    """JSON that is made while it is sent, in a thread: all prompts together may be more than memory holds."""
    return StreamingResponse(parts, media_type="application/json")


def _joined(values: Iterable[str]) -> Iterator[str]:
    """With commas between them."""
    for number, value in enumerate(values):
        yield f", {value}" if number else value

"""Events of a run as ComfyUI's messages, in ComfyUI's order, and the same for history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from usoflow.server.hub import Key, Outgoing
from usoflow.service.engine import Cached, Finished, Progress, Started
from usoflow.service.jobs import Job, State, now, nowhere
from usoflow.service.supervisor import Event, Running


def messages_of(running: Running, event: Event) -> Iterator[Outgoing]:
    """What the client of a job is told."""
    job = running.job
    about = {"prompt_id": job.id}
    match event:
        case State.IN_PROGRESS:
            yield execution_start(job)
        case State():
            yield Outgoing(*_end(job))
            yield Outgoing("executing", {**about, "node": None})
        case Cached(nodes, shown):
            yield Outgoing("execution_cached", {**about, "nodes": list(nodes), "timestamp": now()})
            for node, output in shown.items():
                yield _executed(job, node, output)
        case Started(node):
            yield progress_state(running)
            yield executing(job, node)
        case Progress():
            yield from _progress(running, event)
        case Finished(node=node):
            yield progress_state(running)
            if event.shown is not None:
                yield _executed(job, node, event.shown)


def _executed(job: Job, node: str, output: Mapping[str, Any]) -> Outgoing:
    """What an output node shows."""
    about = {"node": node, "display_node": node, "prompt_id": job.id}
    return Outgoing("executed", {**about, "output": output})


def execution_start(job: Job) -> Outgoing:
    """That a job runs."""
    return Outgoing("execution_start", {"prompt_id": job.id, "timestamp": job.started})


def executing(job: Job, node: str) -> Outgoing:
    """Which node runs."""
    return Outgoing("executing", {"node": node, "display_node": node, "prompt_id": job.id})


def progress_state(running: Running) -> Outgoing:
    """How far every node is that has begun."""
    nodes = {node: _node_state(running, progress) for node, progress in tuple(running.progress.items())}
    data = {"prompt_id": running.job.id, "nodes": nodes}
    return Outgoing("progress_state", data, key=("progress_state", running.job.id))


def history_entry(job: Job, prompt: list[Any]) -> dict[str, Any]:
    """One value of `/history`."""
    start = execution_start(job)
    begun: list[list[Any]] = [
        [start.type, start.data],
        ["execution_cached", {"nodes": job.cached, "prompt_id": job.id, "timestamp": job.started}],
    ]
    messages = [*(begun if job.started else []), list(_end(job))]
    completed = job.state == State.COMPLETED
    status = {"status_str": "success" if completed else "error", "completed": completed, "messages": messages}
    meta = {node: _place(node) for node in job.outputs}
    return {"prompt": prompt, "outputs": job.outputs, "status": status, "meta": meta}


def _place(node: str) -> dict[str, Any]:
    """`_identity`, as the history calls it."""
    return {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}


def _end(job: Job) -> tuple[str, dict[str, Any]]:
    """How a job ended, as a message."""
    kinds = {State.COMPLETED: "execution_success", State.FAILED: "execution_error"}
    about = {"prompt_id": job.id, "timestamp": job.ended}
    where = {} if job.state == State.COMPLETED else job.error or nowhere(job.id)
    return kinds.get(job.state, "execution_interrupted"), {**about, **where}


def _progress(running: Running, event: Progress) -> Iterator[Outgoing]:
    """A picture comes after the step that it shows: comfy-script takes its job from that."""
    yield progress_state(running)
    job, node = running.job, event.node
    data = {"value": event.step, "max": event.steps, "prompt_id": job.id, "node": node}
    yield Outgoing("progress", data, key=("progress", job.id))
    if event.preview:
        yield _picture(job, node, "image/jpeg", event.preview, key=("preview", job.id))
    if event.png:
        yield _picture(job, node, "image/png", event.png)


def _picture(job: Job, node: str, kind: str, image: bytes, key: Key = ()) -> Outgoing:
    about = {**_identity(node), "prompt_id": job.id, "image_type": kind}
    return Outgoing("preview", about, image=image, key=key)


def _node_state(running: Running, progress: Progress) -> dict[str, Any]:
    state = "running" if progress.node == running.node else "finished"
    return {
        "value": progress.step, "max": progress.steps, "state": state, "prompt_id": running.job.id,
        **_identity(progress.node),
    }  # fmt: skip


def _identity(node: str) -> dict[str, Any]:
    """The ids of a node that is not inside another at run time."""
    return {"node_id": node, "display_node_id": node, "parent_node_id": None, "real_node_id": node}

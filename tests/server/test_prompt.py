"""`/prompt`, `/queue`, `/history`, `/jobs`, `/interrupt`: the life of a job as clients see it."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.conftest import ADDRESS, Actor, Serve, application, ended, prompt, settings_of, submit, until
from usoflow.server.context import Limits
from usoflow.server.routes import body
from usoflow.service.jobs import Request, State


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_a_job_from_prompt_to_history(client: TestClient, prefix: str) -> None:
    workflow = {"id": "the-workflow", "nodes": []}
    body = {
        "prompt": prompt(),
        "client_id": "me",
        "extra_data": {"extra_pnginfo": {"workflow": workflow}, "api_key_comfy_org": "secret"},
    }
    answer = client.post(f"{prefix}/prompt", json=body)
    assert answer.status_code == 200
    job = answer.json()["prompt_id"]
    assert answer.json() == {"prompt_id": job, "number": 0, "node_errors": {}}
    details = ended(client, job)
    image = {"filename": "good_00001_.png", "subfolder": "", "type": "output"}
    assert details["outputs"] == {"save": {"images": [image]}}
    assert details["workflow"]["extra_data"] == {"extra_pnginfo": {"workflow": workflow}}  # no secret

    entry = client.get(f"{prefix}/history/{job}").json()[job]
    assert entry["status"]["status_str"] == "success"
    assert entry["status"]["completed"] is True
    names = [name for name, _ in entry["status"]["messages"]]
    assert names == ["execution_start", "execution_cached", "execution_success"]
    assert entry["prompt"][1] == job
    assert entry["prompt"][4] == ["save"]
    assert entry["meta"] == {
        "save": {"node_id": "save", "display_node": "save", "parent_node": None, "real_node_id": "save"}
    }
    assert list(client.get(f"{prefix}/history").json()) == [job]

    listed = client.get(f"{prefix}/jobs?status=completed,failed,cancelled&limit=64&offset=0").json()
    assert listed["pagination"] == {"offset": 0, "limit": 64, "total": 1, "has_more": False}
    (summary,) = listed["jobs"]
    assert summary["preview_output"] == {**image, "nodeId": "save", "mediaType": "images"}
    assert (summary["workflow_id"], summary["outputs_count"]) == ("the-workflow", 1)


def test_a_failed_job_names_node_and_remedy(client: TestClient) -> None:
    job = submit(client, "bad")
    error = ended(client, job)["execution_error"]
    assert (error["node_id"], error["node_type"]) == ("sampler", "KSampler")
    assert (error["exception_type"], error["exception_message"]) == ("out_of_memory", "what\nremedy\n")
    status = client.get(f"/history/{job}").json()[job]["status"]
    assert (status["status_str"], status["messages"][-1][0]) == ("error", "execution_error")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])  # the latter is PowerShell's
def test_half_an_emoji_is_taken_and_given_back(client: TestClient, encoding: str) -> None:
    half = "\ud83d"
    changed = prompt()
    changed["text"]["inputs"]["text"] = f"a cat {half}"
    body = {
        "prompt": changed, "client_id": f"me{half}",
        "extra_data": {"extra_pnginfo": {"workflow": {"id": half, "nodes": [], half: f"\U0001f408 {half}"}}},
    }  # fmt: skip
    answer = client.post("/prompt", content=json.dumps(body).encode(encoding))
    assert answer.status_code == 200
    ended(client, answer.json()["prompt_id"])
    for path in ("/queue", "/history", f"/jobs/{answer.json()['prompt_id']}"):
        assert client.get(path).status_code == 200
    (entry,) = client.get("/history").json().values()
    assert "\U0001f408 \ufffd" in entry["prompt"][3]["extra_pnginfo"]["workflow"].values()


@pytest.mark.parametrize("way", ["/interrupt", "/interrupt by id", "/jobs/cancel", "/jobs/ID/cancel"])
def test_the_running_job_is_stopped(client: TestClient, way: str) -> None:
    job, other = submit(client, "long"), submit(client, "good")
    until(client, job, ("in_progress",))
    client.post("/interrupt", json={"prompt_id": other})  # does not run yet: nothing happens
    assert client.get(f"/jobs/{job}").json()["status"] == "in_progress"
    request: dict[str, tuple[str, Any]] = {
        "/interrupt": ("/api/interrupt", None), "/interrupt by id": ("/interrupt", {"prompt_id": job}),
        "/jobs/cancel": ("/api/jobs/cancel", {"job_ids": [job]}),
        "/jobs/ID/cancel": (f"/jobs/{job}/cancel", None),
    }  # fmt: skip
    path, body = request[way]
    assert client.post(path, json=body).status_code == 200
    assert ended(client, job)["status"] == "cancelled"
    assert ended(client, other)["status"] == "completed"
    status = client.get(f"/history/{job}").json()[job]["status"]
    assert status["messages"][-1][0] == "execution_interrupted"


@pytest.mark.parametrize("odd", [5, True, ["x"], {"id": "x"}])
def test_an_id_that_is_none_stops_nothing(client: TestClient, odd: Any) -> None:
    job = submit(client, "long")
    until(client, job, ("in_progress",))
    answer = client.post("/interrupt", json={"prompt_id": odd})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "prompt_id is not a text.")
    assert client.get(f"/jobs/{job}").json()["status"] == "in_progress"
    assert client.post("/interrupt", json={"prompt_id": None}).status_code == 200
    assert ended(client, job)["status"] == "cancelled"


def test_queue_order_front_and_delete(client: TestClient) -> None:
    running = submit(client, "long")
    until(client, running, ("in_progress",))
    first, second, third = (submit(client) for _ in range(3))
    front = submit(client, front=True)
    queue = client.get("/queue").json()
    assert [entry[1] for entry in queue["queue_running"]] == [running]
    assert [entry[1] for entry in queue["queue_pending"]] == [front, first, second, third]
    assert queue["queue_pending"][0][0] < 0
    client.post("/queue", json={"delete": [second, running]})
    assert client.get(f"/jobs/{second}").json()["status"] == "cancelled"
    assert second not in client.get("/history").json()  # it has not run
    listed = client.get("/jobs").json()
    assert second not in [job["id"] for job in listed["jobs"]]
    assert listed["pagination"]["total"] == len(listed["jobs"]) == 4
    (message,) = client.get(f"/jobs/{second}").json()["execution_status"]["messages"]
    assert message[0] == "execution_interrupted"
    assert message[1]["timestamp"]
    assert message[1].keys() >= {"prompt_id", "node_id", "node_type", "executed"}
    assert client.get("/prompt").json() == {"exec_info": {"queue_remaining": 4}}
    client.post("/queue", json={"clear": True})
    client.post("/interrupt")
    assert ended(client, running)["status"] == "cancelled"
    assert client.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}


@pytest.mark.parametrize("front", [1, "yes", {"a": 1}])
def test_the_front_is_what_is_not_nothing(client: TestClient, front: Any) -> None:
    running, first = submit(client, "long"), submit(client)
    until(client, running, ("in_progress",))
    again = submit(client, front=front)
    assert [entry[1] for entry in client.get("/queue").json()["queue_pending"]] == [again, first]
    client.post("/interrupt")


@pytest.mark.parametrize("path", ["/queue", "/history"])
def test_a_long_list_is_not_in_memory_as_a_whole(place: Path, small_models: Path, path: str) -> None:
    """As a script reads it that forgets `max_items`, after a day of large workflows."""
    app = application(settings_of(small_models, place), Actor())
    store = app.state.server.store
    for number in range(40):
        extra = {"extra_pnginfo": {"workflow": {"text": "x" * 250_000}}}
        store.add(Request(id=str(number), prompt={}, targets=(), extra=extra), limit=100)
        if path == "/history":
            store.start_next()
            store.finish(str(number), State.COMPLETED)
    sizes: list[int] = []

    async def send(message: Mapping[str, Any]) -> None:
        sizes.append(len(message.get("body", b"")))

    async def receive() -> Mapping[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
    tracemalloc.start()
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    store.close()
    assert sum(sizes) > 10_000_000
    assert peak < 4_000_000


def test_a_large_body_holds_up_nobody(client: TestClient) -> None:
    """It is decoded beside the event loop, to the same result."""
    seen: list[str] = []
    decode = body.read_json

    def noted(data: bytes) -> Any:
        seen.append(threading.current_thread().name)
        return decode(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "read_json", noted)
        for text in ("", "x" * 2_000_000):
            assert client.post("/prompt", json={"prompt": prompt(), "x": text}).status_code == 200
    small, large = seen
    assert small != large
    assert "worker" in large.lower()
    assert client.post("/prompt", content=b"[" * 2_000_000).json()["error"]["type"] == "body_invalid"


def test_history_pages_and_deletes(client: TestClient) -> None:
    jobs = [submit(client) for _ in range(3)]
    for job in jobs:
        ended(client, job)
    assert list(client.get("/history").json()) == jobs
    assert list(client.get("/history?max_items=2").json()) == jobs[1:]
    pages = [list(client.get(f"/history?max_items=2&offset={start}").json()) for start in (0, 2, 4)]
    assert pages == [jobs[:2], jobs[2:], []]
    assert list(client.get("/history?max_items=100000&offset=-1").json()) == jobs
    assert list(client.get("/history?max_items=-1").json()) == []
    client.post("/history", json={"delete": [jobs[0]]})
    assert list(client.get("/history").json()) == jobs[1:]
    client.post("/history", json={"clear": True})
    assert client.get("/history").json() == {}
    assert client.get("/history/unknown").json() == {}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"[]", "no_prompt"),
        (b"{}", "no_prompt"),
        (b"", "no_prompt"),
        (b'{"prompt": []}', "prompt_no_outputs"),
        (b'{"prompt": {}}', "prompt_no_outputs"),
        (b'{"prompt": "text"}', "invalid_prompt"),
        (b'{"prompt": {"1": 5}}', "invalid_prompt"),
        (b'{"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}}', "invalid_prompt"),
        (b'{"prompt": {"1": {"class_type": "SaveImage"}}}', "prompt_outputs_failed_validation"),
        (b"{not json", "body_invalid"),
        (b"\xff\xfe", "body_invalid"),
        (b'{"prompt":' + b"[" * 100_000, "body_invalid"),
    ],
)
def test_what_is_no_prompt_is_refused_in_comfyuis_words(client: TestClient, body: bytes, kind: str) -> None:
    answer = client.post("/api/prompt", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == kind
    assert "node_errors" in answer.json()


@pytest.mark.parametrize(
    ("prefix", "kind", "advice"),
    [("../x", "path_outside", "relative to the folder"), ("x" * 300, "prompt_invalid", "240 bytes")],
)
def test_a_name_that_no_picture_can_have_is_refused_at_once(
    client: TestClient, prefix: str, kind: str, advice: str
) -> None:
    answer = client.post("/prompt", json={"prompt": prompt(prefix)})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, kind)
    assert "SaveImage (node save)" in error["message"]
    assert advice in error["details"]
    assert client.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}


WORKFLOW = {"nodes": [{"id": 1, "type": "SaveImage"}], "links": [], "version": 0.4}


@pytest.mark.parametrize(
    ("body", "kind", "advice"),
    [
        ({"prompt": WORKFLOW}, "invalid_prompt", "usoflow convert FILE"),
        ({"prompt": WORKFLOW}, "invalid_prompt", "Export (API)"),
        (WORKFLOW, "no_prompt", "usoflow convert FILE"),
        (prompt(), "no_prompt", '{"prompt": ...}'),
    ],
)
def test_what_is_sent_instead_of_a_prompt_is_recognised(
    client: TestClient, body: dict[str, Any], kind: str, advice: str
) -> None:
    answer = client.post("/prompt", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, kind)
    assert advice in error["details"]
    assert ("editor's workflow" in error["message"] + error["details"]) == (body != prompt())


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        ({}, "prompt"),
        ({"prompt": {}}, "SaveImage or PreviewImage"),
        ({"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}}, "/object_info"),
        ({"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}, "node_errors"),
        ({"prompt": WORKFLOW}, "usoflow convert"),
    ],
)
def test_every_refusal_has_a_remedy(client: TestClient, body: dict[str, Any], remedy: str) -> None:
    assert remedy in client.post("/prompt", json=body).json()["error"]["extra_info"]["remedy"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"{not json", "column 2"), (b"\xff\xfa", "utf-8"), (b"[" * 150 + b"]" * 150, "nested")],
)
def test_a_body_is_json_and_no_picture(client: TestClient, body: bytes, reason: str) -> None:
    message = client.post("/prompt", content=body).json()["error"]["message"]
    assert message.startswith("The body is not JSON: ")
    assert reason in message
    assert "PNG" not in message


def test_errors_are_at_the_node_and_the_input(client: TestClient) -> None:
    wrong = prompt()
    wrong["sampler"]["inputs"]["steps"] = 0
    wrong["loader"]["inputs"]["ckpt_name"] = "other.safetensors"
    answer = client.post("/prompt", json={"prompt": wrong}).json()
    assert answer["error"]["type"] == "prompt_outputs_failed_validation"
    (steps,) = answer["node_errors"]["sampler"]["errors"]
    assert (steps["type"], steps["details"]) == ("value_smaller_than_min", "steps")
    (file,) = answer["node_errors"]["loader"]["errors"]
    assert "flux1-dev-fp8.safetensors" in file["extra_info"]["remedy"]
    assert client.get("/jobs").json()["jobs"] == []


def test_partial_execution(client: TestClient) -> None:
    both = prompt()
    both["second"] = {**both["save"]}
    job = client.post("/prompt", json={"prompt": both, "partial_execution_targets": ["save"]}).json()[
        "prompt_id"
    ]
    assert client.get(f"/history/{ended(client, job)['id']}").json()[job]["prompt"][4] == ["save"]


def test_limits_are_clear(serve: Serve) -> None:
    client = serve(limits=Limits(body=20_000, nodes=10, queue=2))
    running = submit(client, "long")
    until(client, running, ("in_progress",))
    waiting = submit(client)
    full = client.post("/prompt", json={"prompt": prompt()})
    assert (full.status_code, full.json()["error"]["type"]) == (429, "queue_full")
    assert int(full.headers["Retry-After"]) > 0
    many = prompt() | {str(number): prompt()["save"] for number in range(10)}
    assert client.post("/prompt", json={"prompt": many}).json()["error"]["type"] == "too_many_nodes"
    large = json.dumps({"prompt": prompt(), "x": "x" * 30_000}).encode()
    assert client.post("/prompt", content=large).status_code == 413
    chunks = (large[start : start + 1000] for start in range(0, len(large), 1000))
    assert client.post("/prompt", content=chunks).status_code == 413
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + large
    headers = {"content-type": "multipart/form-data; boundary=x"}
    parts = (form[start : start + 1000] for start in range(0, len(form), 1000))
    assert client.post("/upload/image", content=parts, headers=headers).status_code == 413
    client.post("/interrupt")
    assert ended(client, waiting)["status"] == "completed"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt_id": "mine-1"}, 200),
        ({"prompt_id": "../x"}, 400),
        ({"prompt_id": 5}, 400),
        ({"number": 5}, 200),
        ({"number": "5"}, 400),
        ({"number": True}, 400),
        ({"number": 10**400}, 400),
        ({"number": [5]}, 400),
        ({"client_id": "x" * 1001}, 400),  # under which nobody can listen
        ({"client_id": 5, "extra_data": 5, "partial_execution_targets": 5}, 200),
    ],
)
def test_odd_values(client: TestClient, body: dict[str, Any], status: int) -> None:
    answer = client.post("/prompt", json={"prompt": prompt(), **body})
    assert answer.status_code == status
    if "prompt_id" in body and status == 200:
        assert answer.json()["prompt_id"] == "mine-1"
        ended(client, "mine-1")
        assert client.post("/prompt", json={"prompt": prompt(), **body}).status_code == 409


@pytest.mark.parametrize(
    "query",
    ["status=nonsense", "limit=x", "limit=0", "offset=-1", "sort_order=up"],
)
def test_odd_pages(client: TestClient, query: str) -> None:
    assert client.get(f"/api/jobs?{query}").status_code == 400


@pytest.mark.parametrize("limit", [1001, 99999999999999999999])
def test_a_page_has_no_more_than_its_limit(client: TestClient, limit: int) -> None:
    assert client.get(f"/api/jobs?limit={limit}").json()["pagination"]["limit"] == 1000


def test_jobs_by_how_long_they_ran(place: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = application(settings_of(small_models, place), Actor())
    store, client = app.state.server.store, TestClient(app, base_url=ADDRESS)
    for number, seconds in enumerate((9, 2)):
        name, begin = f"{seconds} s", 100 * number
        store.add(Request(id=name, prompt={}, targets=(), extra={}), limit=1)
        monkeypatch.setattr("usoflow.service.store.now", lambda begin=begin: begin)
        store.start_next()
        monkeypatch.setattr("usoflow.service.store.now", lambda end=begin + seconds: end)
        store.finish(name, State.COMPLETED)
    for query, order in (
        ("", ["2 s", "9 s"]),
        ("sort_by=create_time", ["2 s", "9 s"]),
        ("sort_by=execution_time", ["9 s", "2 s"]),
        ("sort_by=execution_duration", ["9 s", "2 s"]),
        ("sort_by=execution_time&sort_order=asc", ["2 s", "9 s"]),
    ):
        assert [job["id"] for job in client.get(f"/api/jobs?{query}").json()["jobs"]] == order
    store.close()


def test_free_reaches_the_engine(client: TestClient) -> None:
    engine = client.app.state.server.engine  # type: ignore[attr-defined]
    for asked in ({"unload_models": True}, {}, {"free_memory": True}, {"unload_models": 1, "free_memory": 1}):
        assert client.post("/api/free", json=asked).status_code == 200
    assert engine.freed == [False, True, True]  # whether results are forgotten, too


@pytest.mark.parametrize(("number", "kind"), [(7, int), (0.5, float)])
def test_a_place_in_the_queue_is_a_whole_number_where_it_can_be(
    client: TestClient, number: float, kind: type
) -> None:
    running = submit(client, "long")
    until(client, running, ("in_progress",))
    job = submit(client, number=number)
    places = [
        client.get(f"/jobs/{job}").json()["priority"],
        client.get("/jobs?status=pending").json()["jobs"][0]["priority"],
        client.get("/queue").json()["queue_pending"][0][0],
    ]
    assert [(place, type(place)) for place in places] == [(number, kind)] * 3
    client.post("/interrupt")
    ended(client, job)


PICTURE = {"filename": "a.png", "subfolder": "x", "type": "temp"}


@pytest.mark.parametrize(
    ("outputs", "count", "preview"),
    [
        ({"1": {"text": ["a", "b"]}}, 2, None),
        (
            {"1": {"text": ["a"]}, "2": {"images": [PICTURE], "text": "no list"}},
            2,
            {**PICTURE, "nodeId": "2"},
        ),
        ({"1": {"images": [{"source": "data:,"}, 5, {"filename": None}]}}, 3, None),
        ({"1": {"images": None, "x": None}}, 0, None),
        (
            {"1": {"images": [{"filename": "a.png"}]}},
            1,
            {"filename": "a.png", "subfolder": "", "type": "output", "nodeId": "1"},
        ),
    ],
)
def test_outputs_of_any_kind_are_counted_and_pictures_shown(
    place: Path, small_models: Path, outputs: dict[str, Any], count: int, preview: dict[str, Any] | None
) -> None:
    app = application(settings_of(small_models, place), Actor())
    store, client = app.state.server.store, TestClient(app, base_url=ADDRESS)
    store.add(Request(id="job", prompt={}, targets=(), extra={}), limit=1)
    store.start_next()
    for node, shown in outputs.items():
        store.note_output("job", node, shown)
    store.finish("job", State.COMPLETED)
    summary = client.get("/jobs").json()["jobs"][0]
    assert summary["outputs_count"] == count
    assert summary.get("preview_output") == (preview and {**preview, "mediaType": "images"})
    assert client.get("/jobs/job").json()["outputs"] == outputs
    store.close()


def test_what_failed_tells_its_values(client: TestClient) -> None:
    inputs = ended(client, submit(client, "bad"))["execution_error"]["current_inputs"]
    sent = prompt()["sampler"]["inputs"]
    assert inputs == {name: [value] for name, value in sent.items() if not isinstance(value, list)}


@pytest.mark.parametrize("path", ["/prompt", "/userdata/workflows%2Fa.json", "/upload/image"])
def test_a_client_that_leaves_while_it_sends_is_no_defect(place: Path, small_models: Path, path: str) -> None:
    app = application(settings_of(small_models, place), Actor())
    messages = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Mapping[str, Any]] = []

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> Mapping[str, Any]:
        return messages.pop(0)

    form = "multipart/form-data; boundary=x" if path == "/upload/image" else "application/json"
    headers = [(b"host", b"localhost"), (b"content-type", form.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    app.state.server.store.close()
    assert sent[0]["status"] == 400

"""Who may ask: other sites may not, nor anybody without the token beyond this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.websockets import WebSocketDisconnect

from server.conftest import SOCKET, Serve
from usoflow.errors import UsoflowError

OURS = "http://127.0.0.1:8188"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8188"}, 200),
        ({"host": "[::1]:8188"}, 200),
        ({"host": "rebound.example:8188"}, 403),
        ({"host": ""}, 403),
        ({"host": "["}, 403),
        ({"origin": OURS}, 200),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "https://example.com"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://127.0.0.1:8188.example.com"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
    ],
)
def test_host_and_origin(client: TestClient, headers: dict[str, str], status: int) -> None:
    answer = client.get("/api/queue", headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["details"]  # what to do


def test_a_form_of_another_site_changes_nothing(client: TestClient) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.post("/api/interrupt", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers", [{"origin": "null"}, {"origin": "https://example.com"}, {"host": "x.example"}]
)
def test_sockets_are_guarded_alike(client: TestClient, headers: dict[str, str]) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(SOCKET, headers=headers):
        pass
    with client.websocket_connect(SOCKET, headers={"origin": OURS}):
        pass


def test_token(serve: Serve) -> None:
    client = serve(token="correct-horse", listen="0.0.0.0")
    assert client.get("/api/queue", headers={"host": "my-machine:8188"}).status_code == 401
    assert client.get("/?token=wrong", follow_redirects=False).status_code == 401
    assert client.get("/api/queue", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/api/queue", headers={"authorization": "Bearer correct-horse"}).status_code == 200
    assert client.get("/api/queue", headers={"authorization": "bearer correct-horse"}).status_code == 200
    assert client.get("/health/live").status_code == client.get("/api/health/live").status_code == 200
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(SOCKET):
        pass
    entered = client.get("/?token=correct-horse&template=uso", follow_redirects=False)
    assert entered.status_code == 303
    assert entered.headers["location"] == "./?template=uso"  # also where a proxy has it in a folder
    cookie = entered.headers["set-cookie"].lower()
    assert "max-age=" in cookie  # who closes the browser need not look for the token again
    assert "httponly" in cookie
    assert "samesite=lax" in cookie  # a link of another site opens the editor
    assert client.get("/api/queue").status_code == 200  # the cookie
    assert client.get("/api/queue", headers={"host": "127.0.0.1:8189"}).status_code == 401  # another server's
    with client.websocket_connect(SOCKET) as socket:
        assert socket.receive_json()["type"] == "status"


def test_a_person_without_the_token_is_asked_for_it(serve: Serve) -> None:
    client = serve(token="correct-horse", listen="0.0.0.0")
    page = client.get("/", headers={"accept": "text/html,*/*"})
    assert (page.status_code, page.headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert '<input name="token" type="password"' in page.text
    assert client.get("/", headers={"accept": "*/*"}).json()["error"]["type"] == "token_needed"
    assert client.get("/queue", headers={"accept": "text/html"}).json()["error"]["type"] == "token_needed"


@pytest.mark.parametrize("token", ["schlüssel", "a\nb"])
def test_a_token_that_no_header_carries_is_refused_at_the_start(serve: Serve, token: str) -> None:
    with pytest.raises(UsoflowError) as caught:
        serve(token=token)
    assert caught.value.code == "settings_invalid"


@pytest.mark.parametrize("others", ['x={"a":1}; ', "a/b=1; ", "usoflow; "])
def test_cookies_of_other_programs_lock_nobody_out(serve: Serve, others: str) -> None:
    client = serve(token="t", listen="0.0.0.0")
    assert client.get("/api/queue", headers={"cookie": f"{others}usoflow_token_8188=t"}).status_code == 200
    assert client.get("/api/queue", headers={"cookie": others}).status_code == 401


def test_every_response_says_what_it_is(client: TestClient) -> None:
    for path in ("/api/queue", "/no/such/path", "/view?filename=x"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/", "/health/ready", "/api/prompt", "/view?filename=a.png"])
def test_head_is_get_without_the_body(client: TestClient, place: Path, path: str) -> None:
    Image.new("RGB", (4, 4)).save(place / "output" / "a.png")
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == whole.headers[name]


def test_what_there_is_not_is_404(client: TestClient) -> None:
    for path in ("/no/such/path", "/api/assets", "/api/v2/x", "/api/models/nonsense", "/api/jobs/none"):
        assert client.get(path).status_code == 404, path


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/api/nope", 404),
        ("PUT", "/queue", 405),
        ("GET", "/api/jobs/none", 404),
        ("POST", "/jobs/none/cancel", 404),
        ("GET", "/jobs?sort_order=up", 400),
        ("GET", "/jobs?limit=x", 400),
        ("GET", "/api/models/nonsense", 404),
        ("GET", "/experiment/models/nonsense", 404),
        ("GET", "/userdata?dir=nonsense", 404),
        ("GET", "/userdata", 400),
        ("GET", "/view?filename=none.png", 404),
        ("POST", "/upload/image", 400),
    ],
)
def test_every_error_has_one_form(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"]
    assert error["message"]
    assert error["extra_info"]["remedy"] == error["details"]
    assert answer.json()["node_errors"] == {}


def test_what_is_not_there_is_named(client: TestClient) -> None:
    assert client.get("/nope").json()["error"]["message"] == "There is no GET /nope."
    refused = client.put("/queue")
    assert refused.json()["error"]["message"] == "There is no PUT /queue."
    assert refused.headers["allow"]
    form = client.post("/upload/image", content=b"x", headers={"content-type": "multipart/form-data"})
    assert (form.status_code, form.json()["error"]["type"]) == (400, "body_invalid")
    assert "boundary" in form.json()["error"]["message"]


def test_a_wrong_status_of_jobs_is_answered_as_comfyui_does(client: TestClient) -> None:
    answer = client.get("/api/jobs?status=foo,pending")
    valid = "pending, in_progress, completed, failed, cancelled"
    assert answer.status_code == 400
    assert answer.json() == {"error": f"Invalid status value(s): foo. Valid values: {valid}"}


@pytest.mark.parametrize("mode", ["no-cors", "cors"])
def test_a_page_of_another_port_is_another_site(client: TestClient, mode: str) -> None:
    headers = {"sec-fetch-site": "same-site", "sec-fetch-mode": mode}
    assert client.get("/api/queue", headers=headers).status_code == 403


@pytest.mark.parametrize("token", [None, "t"])
def test_a_body_that_is_announced_too_large_is_not_even_read(serve: Serve, token: str | None) -> None:
    client = serve(token=token)
    headers = {"content-length": str(10**10), "authorization": "Bearer t"}
    answer = client.post("/prompt", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "body_too_large")
    if token:  # who may not send anything learns nothing of how much it might be
        assert (
            client.post("/prompt", content=b"{}", headers=headers | {"authorization": ""}).status_code == 401
        )

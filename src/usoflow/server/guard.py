"""What every request must pass before a route sees it, and what every response carries.

A page of another site that a browser shows on this machine can send requests here; whether it may is told by
Host (against DNS rebinding), Origin and Sec-Fetch-Site. Beyond loopback a token is needed as well.
"""

from __future__ import annotations

import hmac
import re
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from usoflow.errors import UsoflowError
from usoflow.server.context import LOOPBACK, ServerSettings
from usoflow.server.errors import error_body

COOKIE: Final = "usoflow_token"
COOKIE_SECONDS: Final = 30 * 24 * 3600  # that a browser knows the token
TOKEN_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>usoflow</title>
<body style="font: 16px sans-serif; margin: 20vh auto; max-width: 30em">
<p>Enter the token of this server. It is the part after <code>?token=</code> in the address that
<code>usoflow serve</code> printed when it started.</p>
<form><input name="token" type="password" size="30" autofocus required> <button>Open</button></form>
"""
PREFIX: Final = "/api"
OPEN_PATHS: Final = ("/health/live", "/health/ready")
POLICY: Final = "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
REFUSED_SOCKET: Final = 1008


class Guard:
    """ASGI middleware: checks, the `/api` prefix, body limit, headers."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope.get("method") == "HEAD":  # as GET; what sends the answer leaves out the body
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        answer = self._refusal(scope, headers)
        if answer is None:
            await self._app(_without_prefix(scope), self._limited(receive), _protected(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": REFUSED_SOCKET})
        else:
            await answer(scope, receive, _protected(send))

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that goes no further."""
        host = headers.get("host", "")
        if not self._host_is_ours(host):
            return _refused(403, UsoflowError("host_refused", f"{host!r} is no name of this server."))
        if _is_foreign(scope, headers):
            return _refused(403, UsoflowError("origin_refused", f"{_sender(headers)} is not this server."))
        if self._settings.token and _without_prefix(scope)["path"] not in OPEN_PATHS:
            answer = self._token_answer(scope, headers, self._settings.token)
            if answer is not None:
                return answer
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or int(length) > self._settings.limits.body:
            return JSONResponse(error_body(self._too_large()), 413)
        return None

    def _host_is_ours(self, host: str) -> bool:
        """With a token any name will do: another site does not have the cookie of this one."""
        return self._settings.token is not None or _hostname(host) in (*LOOPBACK, self._settings.listen)

    def _token_answer(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        name = _cookie_name(headers)
        if scope["path"] == "/" and any(key == "token" and _same(value, token) for key, value in query):
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            here = "./"  # whatever a proxy calls it
            answer = RedirectResponse(f"{here}?{rest}" if rest else here, 303)
            # Lax: who follows a link of another site is let in; `_is_foreign` refuses all else.
            answer.set_cookie(name, token, COOKIE_SECONDS, httponly=True, samesite="lax", path="/")
            return answer
        cookie = cookie_parser(headers.get("cookie", "")).get(name, "")
        bearer = re.sub("^bearer ", "", headers.get("authorization", ""), flags=re.IGNORECASE)
        if _same(bearer, token) or _same(cookie, token):
            return None
        if scope["path"] == "/" and "text/html" in headers.get("accept", ""):
            return HTMLResponse(TOKEN_PAGE, 401)
        return _refused(401, UsoflowError("token_needed", "The request has no token, or a wrong one."))

    def _limited(self, receive: Receive) -> Receive:
        """The body, as far as it may go; a body sent in chunks does not tell its length beforehand."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._settings.limits.body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> UsoflowError:
        most = self._settings.limits.body // 2**20
        return UsoflowError("body_too_large", f"The request is larger than {most} MiB.")


def _is_foreign(scope: Scope, headers: Headers) -> bool:
    """Whether a browser sends this for a page of another site, other than to show ours."""
    origin = headers.get("origin")
    if origin is not None:  # as in RFC 6454, scheme and host, or "null"
        return origin == "null" or origin.partition("://")[2] != headers.get("host")
    navigates = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") and not navigates


def _without_prefix(scope: Scope) -> Scope:
    """Every route is there with and without `/api`."""
    path: str = scope["path"]
    return {**scope, "path": path.removeprefix(PREFIX)} if path.startswith(f"{PREFIX}/") else scope


def _protected(send: Send) -> Send:
    """Responses are what they say they are, and are shown in no other site's frame."""

    async def protected(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("Content-Security-Policy", POLICY)
            headers.setdefault("Referrer-Policy", "no-referrer")
        await send(message)

    return protected


def _hostname(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # of brackets that do not match
        return None


def _cookie_name(headers: Headers) -> str:
    """One for each port: cookies are of a host, on which there may be several servers."""
    try:
        port = urlsplit(f"//{headers.get('host', '')}").port
    except ValueError:
        port = None
    return COOKIE if port is None else f"{COOKIE}_{port}"


def _sender(headers: Headers) -> str:
    origin = headers.get("origin")
    return "The site that asks" if origin is None else origin


def _refused(status: int, error: UsoflowError) -> Response:
    return JSONResponse(error_body(error), status)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())

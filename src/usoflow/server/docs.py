"""`/docs`: the routes on one plain page of our own; FastAPI's is made by other hosts, so blank offline."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from html import escape
from string import Template
from typing import Final

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute, APIWebSocketRoute

_PAGE: Final = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>usoflow: the API</title>
<style>
body { font: 16px/1.5 sans-serif; margin: 2em; color-scheme: light dark }
th, td { text-align: left; padding: 0 1.5em 0 0; vertical-align: top }
</style>
<h1>usoflow: the API</h1>
<p>ComfyUI's routes, each with and without <code>/api</code>. Their parameters are in
<a href="openapi.json">openapi.json</a>.</p>
<p>Errors are
<code>{"error": {"type", "message", "details", "extra_info": {"remedy"}}, "node_errors"}</code>.</p>
<table>
<tr><th>method<th>path<th>
$rows
</table>
</html>
""")


def mount_docs(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Serve the page."""
    rows = "\n".join(_row(*entry) for router in routers for entry in _entries(router))
    page = _PAGE.substitute(rows=rows)
    app.add_api_route("/docs", lambda: HTMLResponse(page), include_in_schema=False)


def _entries(router: APIRouter) -> Iterator[tuple[str, str, str]]:
    """Method, path, and the first line of the docstring."""
    for route in router.routes:
        if isinstance(route, APIRoute | APIWebSocketRoute):
            methods = ", ".join(sorted(route.methods or ())) if isinstance(route, APIRoute) else "WebSocket"
            yield methods, route.path_format, (inspect.getdoc(route.endpoint) or "").partition("\n")[0]


def _row(method: str, path: str, text: str) -> str:
    return f"<tr><td>{escape(method)}<td><code>{escape(path)}</code><td>{escape(text)}"

"""What the routes share: settings, store, supervisor, nodes, and who listens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from anyio import CapacityLimiter
from fastapi import Depends
from starlette.requests import HTTPConnection

from usoflow.errors import UsoflowError
from usoflow.schema.node import Node, NodeRegistry
from usoflow.server.files import Uploads
from usoflow.server.hub import Hub
from usoflow.server.log import LogBuffer
from usoflow.service.engine import Engine
from usoflow.service.jobs import WAITING
from usoflow.service.store import JobStore
from usoflow.service.supervisor import Supervisor
from usoflow.settings import Folders

if TYPE_CHECKING:
    from usoflow.server.templates import Templates

MIB: Final = 2**20
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is taken; beyond, a clear 4xx."""

    body: int = 100 * MIB  # bytes of a request, uploads included
    nodes: int = 5000  # of a prompt
    queue: int = 1000  # jobs that wait
    pixels: int = 64_000_000  # of an uploaded picture, all frames together


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server runs.

    Attributes:
        folders: models, inputs, outputs.
        state: where jobs, settings and saved workflows are kept.
        listen: address to bind.
        token: what clients must know; needed beyond loopback.
        ui: whether the official editor is served.
        preview: whether pictures are sent while they are sampled.
        custom_nodes: folder of the user's own nodes.

    Raises:
        UsoflowError: `settings_invalid`.
    """

    folders: Folders
    state: Path
    listen: str = "127.0.0.1"
    token: str | None = None
    ui: bool = True
    preview: bool = True
    custom_nodes: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            what, advice = "The token cannot be sent in a header.", "Make it of letters and digits of ASCII."
            raise UsoflowError("settings_invalid", what, remedy=advice)

    @property
    def jobs_file(self) -> Path:
        """The database."""
        return self.state / "jobs.sqlite"

    @property
    def examples(self) -> Path:
        """Pictures that templates expect."""
        return self.state / "examples"

    @property
    def user_folder(self) -> Path:
        """Saved workflows."""
        return self.state / "user"

    def with_inputs(self, folder: Path) -> ServerSettings:
        """A copy that also finds input pictures there."""
        return replace(self, folders=replace(self.folders, inputs=(*self.folders.inputs, folder)))


@dataclass
class Server:
    """Everything that lives as long as the server; `opened` is closed with it."""

    settings: ServerSettings
    store: JobStore
    engine: Engine
    own_nodes: NodeRegistry
    hub: Hub
    supervisor: Supervisor
    templates: Templates
    log: LogBuffer
    uploads: Uploads = field(default_factory=Uploads, init=False)
    opened: ExitStack = field(default_factory=ExitStack, init=False)
    decoding: CapacityLimiter = field(init=False)  # of the event loop; each picture may need a GB
    _counting: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def folders(self) -> Folders:
        """Where files are."""
        return self.settings.folders

    @property
    def registry(self) -> NodeRegistry:
        """Every node type; waits for a worker that is loading custom ones."""
        if self.settings.custom_nodes is None:
            return self.own_nodes
        custom = [Node(schema, _runs_elsewhere) for schema in self.engine.nodes()]
        return NodeRegistry([*self.own_nodes.values(), *custom])

    def queue_changed(self, before: Callable[[], None] = lambda: None) -> None:
        """Tell everybody how many jobs wait; `before` that, but once it is known, something else."""
        with self._counting:  # so that what is told last is what was counted last
            waiting = self.store.count(WAITING)
            before()
            self.hub.status(waiting)

    def counted(self, join: Callable[[int], None]) -> None:
        """Have the event loop call `join` with how many jobs wait, before anybody is told of a change."""
        with self._counting:
            self.hub.soon(join, self.store.count(WAITING))


def _runs_elsewhere(*_: object, **__: object) -> None:
    raise AssertionError("custom nodes run in the worker")


def _server(connection: HTTPConnection) -> Server:
    server: Server = connection.app.state.server
    return server


ServerOf = Annotated[Server, Depends(_server)]

Json = dict[str, Any]

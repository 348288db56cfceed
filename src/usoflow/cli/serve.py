"""`usoflow serve`: the editor and the API, in a browser and for scripts."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from usoflow.cli.options import (
    Compiled,
    CustomNodes,
    Device,
    Dtype,
    InDtype,
    Input,
    Models,
    OnDevice,
    Output,
    Vram,
)
from usoflow.errors import UsoflowError

STATE_VARIABLE = "USOFLOW_STATE"
TOKEN_VARIABLE = "USOFLOW_TOKEN"


def serve(
    models: Models = None,
    inputs: Input = None,
    output: Output = None,
    port: Annotated[int, typer.Option(help="Where to listen.", min=1, max=65535)] = 8188,
    listen: Annotated[
        str, typer.Option(help="Address; beyond this machine a token is needed.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN_VARIABLE, help="What clients must send; made up if --listen lets others in."
        ),
    ] = None,
    preview: Annotated[bool, typer.Option(help="Show pictures while they are made.")] = True,
    ui: Annotated[bool, typer.Option(help="Serve the editor, and open it in a browser.")] = True,
    custom_nodes: CustomNodes = None,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.auto,
    vram: Vram = None,
    compiled: Compiled = None,
) -> None:
    """Serve the editor and ComfyUI's API."""
    import platformdirs

    from usoflow.nodes.custom_folder import check_folder
    from usoflow.server.app import create_app
    from usoflow.server.context import LOOPBACK, ServerSettings
    from usoflow.server.serving import serve as serve_app
    from usoflow.settings import bytes_of, check_writable, expanded, find_folders

    if not listen:  # the system takes it for every address that it has
        raise UsoflowError("address_unusable", "--listen is empty.")
    budget = None if vram is None else bytes_of(vram)
    state = expanded(os.environ.get(STATE_VARIABLE) or platformdirs.user_data_path("usoflow") / "server")
    token = token or None  # of an empty variable, say
    made_up = None
    if listen not in LOOPBACK and token is None:
        token = made_up = _own_token(state / "token")
    folders = find_folders(models=models, inputs=inputs, output=output)
    check_writable(folders.output)
    settings = ServerSettings(
        folders=folders,
        state=state,
        listen=listen,
        token=token,
        ui=ui,
        preview=preview,
        custom_nodes=check_folder(custom_nodes) if custom_nodes else None,
    )
    bound = _bound(listen, port)
    app = create_app(settings, device=device.value, dtype=dtype.value, budget=budget, compiled=compiled)
    addresses = [f"http://{host}:{port}/" for host in _hosts(listen)]
    # A token that somebody has set is known, and is not for a log.
    print(f"usoflow: {' or '.join(address + _query(made_up) for address in addresses)}")
    print(
        f"Pictures go to {folders.output.absolute()}, uploads to {folders.inputs[0].absolute()}.", flush=True
    )
    if ui:
        _open_browser(addresses[0] + _query(token))
    serve_app(app, bound)


def _own_token(file: Path) -> str:
    """One that is made up once: pages that were open before go on after a restart."""
    with suppress(OSError, UnicodeDecodeError):
        if known := file.read_text("ascii").strip():
            return known
    made = secrets.token_urlsafe(16)
    with suppress(OSError):  # what is wrong with the folder is told where the jobs are kept
        file.parent.mkdir(parents=True, exist_ok=True)
        private = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        if hasattr(os, "fchmod"):  # one that was there may be for all to read
            os.fchmod(private, 0o600)
        with open(private, "w", encoding="ascii") as kept:
            kept.write(made)
    return made


def _query(token: str | None) -> str:
    return f"?token={quote(token, safe='')}" if token else ""


def _bound(listen: str, port: int) -> socket.socket:
    """The listening socket; taken first, so that an address in use costs nothing."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    try:
        found = socket.socket(family)
    except OSError as error:  # IPv6 may be off
        raise UsoflowError("address_unusable", f"{listen} cannot be used: {error.strerror}.") from None
    try:
        if os.name == "posix":  # elsewhere it lets two programs have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listen == "::":  # IPv4 too, as the addresses say that are printed; Windows' default is not to
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        found.bind((listen, port))
        found.listen()  # whoever reads the address may connect; what serves it later listens once more
    except OSError as error:
        found.close()
        raise UsoflowError("address_unusable", f"{listen}:{port} cannot be used: {error.strerror}.") from None
    return found


def _hosts(listen: str) -> list[str]:
    """Where a browser finds the server: on this machine first, then on others."""
    if listen in ("0.0.0.0", "::"):
        return ["127.0.0.1", *_own_address()]
    return [f"[{listen}]" if ":" in listen else listen]


def _own_address() -> list[str]:
    """This machine's in its network, if it is in one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # chooses a way there (RFC 5737: nowhere) and sends nothing
        except OSError:
            return []
        return [probe.getsockname()[0]]


def _open_browser(address: str) -> None:
    """Where there is a screen; a browser that does not start delays nothing."""
    has_desktop = os.name != "posix" or sys.platform == "darwin"
    if has_desktop or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

"""Any file that holds a workflow -> a prompt: UI JSON, API JSON, the pictures that carry them, templates.

The command line and the Python API load everything through `load`.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from usoflow.errors import UsoflowError
from usoflow.schema.node import NodeRegistry
from usoflow.settings import expanded
from usoflow.workflow import document, metadata
from usoflow.workflow.flatten import flatten
from usoflow.workflow.migration import opened
from usoflow.workflow.prompt import Prompt, looks_like_prompt

TEMPLATE: Final = "template:"
TEMPLATE_PACKAGE: Final = "comfyui_workflow_templates_json"
# Files that carry none, by a place in them and what stands there.
FOREIGN: Final = (
    (0, b"\xff\xd8\xff", "a JPEG carries no workflow"),
    (4, b"ftyp", "workflows in videos, AVIF and HEIC pictures are not read"),
    (0, b"\x1aE\xdf\xa3", "workflows in videos are not read"),
)
LARGEST: Final = 2**30  # bytes of a file with a workflow; models, given by mistake, are larger
MAX_DEPTH: Final = 100


@dataclass(frozen=True, slots=True)
class LoadedWorkflow:
    """The prompt; the UI workflow that it came from, if there is one, as decoded JSON; and warnings."""

    prompt: Prompt
    workflow: dict[str, Any] | None
    warnings: tuple[str, ...] = ()


def load(source: str | Path, registry: NodeRegistry) -> LoadedWorkflow:
    """Load a file by its content, or `template:NAME`; "-" is standard input.

    A picture's prompt is taken as it was executed; its workflow is converted only if it has no prompt.
    Raises UsoflowError: "file_not_found", "template_unknown", "not_a_workflow", "workflow_invalid",
    "prompt_invalid", "subgraph_recursive".
    """
    name = str(source)
    if name.startswith(TEMPLATE):
        return load_json(_template(name.removeprefix(TEMPLATE)), registry)
    try:
        data = sys.stdin.buffer.read() if name == "-" else _bytes(expanded(source))
    except (OSError, ValueError) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise UsoflowError("file_not_found", f"{name}: {why}") from None
    try:
        return load_bytes(data, registry)
    except UsoflowError as error:
        raise UsoflowError(error.code, f"{name}: {error.detail}", remedy=error.remedy) from None


def _bytes(file: Path) -> bytes:
    size = file.stat().st_size
    if size > LARGEST:
        what = f"{file} has {size / 1e9:.1f} GB, more than any workflow"
        raise UsoflowError("not_a_workflow", what)
    return file.read_bytes()


def load_bytes(data: bytes, registry: NodeRegistry) -> LoadedWorkflow:
    """Load what a file holds."""
    for place, signature, what in FOREIGN:
        if data.startswith(signature, place):
            raise UsoflowError("not_a_workflow", what)
    if not metadata.is_picture(data):
        return load_json(read_json(data), registry)
    found = {key: _json_or_none(text) for key, text in metadata.read(data).items()}
    prompt, workflow = found.get("prompt"), found.get("workflow")
    if looks_like_prompt(prompt):
        return LoadedWorkflow(Prompt.parse(prompt), _beside(workflow))
    if workflow is None:
        raise UsoflowError("not_a_workflow", "the picture carries no workflow")
    return load_json(workflow, registry)


def load_value(data: object, registry: NodeRegistry) -> LoadedWorkflow:
    """Load JSON that is in memory already, as if it were read from a file; it may be changed afterwards.

    Raises UsoflowError("not_a_workflow") for what JSON cannot hold.
    """
    try:
        text = json.dumps(data, default=_as_dict)
    except (TypeError, ValueError, RecursionError) as reason:
        raise UsoflowError("not_a_workflow", f"it cannot be JSON ({str(reason)[:200]})") from None
    return load_json(read_json(text), registry)


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not of JSON")


def _json_or_none(text: str) -> Any:
    """Other programs use the same keywords for plain text."""
    try:
        return read_json(text)
    except UsoflowError:
        return None


def load_json(data: object, registry: NodeRegistry) -> LoadedWorkflow:
    """Load decoded JSON: a workflow, a prompt, or the body of a request with a prompt."""
    if isinstance(data, dict) and document.looks_like_workflow(data):
        workflow = opened(data)
        conversion = flatten(document.parse(workflow), registry)
        return LoadedWorkflow(conversion.prompt, workflow, conversion.warnings)
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict) and "class_type" not in data["prompt"]:
        return LoadedWorkflow(Prompt.parse(data["prompt"]), _beside(_workflow_of_request(data)))
    return LoadedWorkflow(Prompt.parse(data), None)


def read_json(text: str | bytes) -> Any:
    """Decode JSON of any origin; NaN and Infinity, which some writers emit, become null.

    Raises UsoflowError("not_a_workflow").
    """
    decoded = text if isinstance(text, str) else text_of(text)
    try:
        data = json.loads(decoded, parse_constant=lambda _: None, parse_float=_finite)
    except RecursionError:
        raise UsoflowError("not_a_workflow", "the JSON is nested too deeply") from None
    except ValueError as reason:
        raise _no_json(reason) from None
    _check_depth(data)
    return data


def text_of(data: bytes) -> str:
    """UTF-8, but for what PowerShell's `>` writes. Raises UsoflowError("not_a_workflow")."""
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except ValueError as reason:
        raise _no_json(reason) from None


def _no_json(reason: ValueError) -> UsoflowError:
    return UsoflowError("not_a_workflow", f"not JSON, PNG or WebP ({str(reason)[:200]})")


def _check_depth(data: object) -> None:
    """Everything after this may recurse into the data."""
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise UsoflowError("not_a_workflow", f"the JSON is nested more than {MAX_DEPTH} levels deep")


def template(name: str) -> dict[str, Any]:
    """An official template as the editor has it. Raises UsoflowError("template_unknown")."""
    return opened(_template(name))


def _template(name: str) -> dict[str, Any]:
    """The same as it is stored."""
    from importlib import resources

    folder = resources.files(TEMPLATE_PACKAGE) / "templates"
    file = folder / f"{name}.json"
    if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) or not file.is_file():
        raise UsoflowError("template_unknown", f"there is no template {name!r}")
    data = read_json(file.read_bytes())
    if not isinstance(data, dict) or not document.looks_like_workflow(data):
        raise UsoflowError("template_unknown", f"{name!r} is not the template of a workflow")
    return data


def _beside(workflow: object) -> dict[str, Any] | None:
    """The workflow beside a prompt, as the editor is to open it."""
    return opened(workflow) if isinstance(workflow, dict) else None


def _workflow_of_request(data: dict[str, Any]) -> object:
    """`extra_data.extra_pnginfo.workflow` of a request body."""
    found: object = data
    for key in ("extra_data", "extra_pnginfo", "workflow"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number

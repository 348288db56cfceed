"""Whether a workflow can be run here, told before anything is loaded; and what to do where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from usoflow.api.workflow import Workflow
from usoflow.catalogue import PULLS, known_file, missing_file_remedy, quoted, same_kind
from usoflow.errors import UsoflowError
from usoflow.file_names import check_prefix
from usoflow.schema.node import NodeRegistry
from usoflow.schema.specs import ModelFile
from usoflow.schema.validation import ValidationResult, validate
from usoflow.settings import Folders, check_writable
from usoflow.workflow.prompt import Prompt, link_of
from usoflow.workflow.text import FILE_NAME, fill_placeholders

Json = dict[str, Any]
SAVES: Final = "SaveImage"
SENDS: Final = "SaveImageWebsocket"
LOADS: Final = ("LoadImage", "LoadImageMask")


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Attributes:
        workflow: with a valid prompt, its values converted.
        targets: the output nodes that can be reached.
        folders: where files are.
        warnings: of the conversion, and what is left out because it is not valid.
    """

    workflow: Workflow
    targets: tuple[str, ...]
    folders: Folders
    warnings: tuple[str, ...]


def check(workflow: Workflow, folders: Folders, nodes: NodeRegistry) -> Job:
    """Validate a workflow against the nodes and files that there are. Imports no torch.

    Raises:
        UsoflowError: `prompt_invalid`, `model_missing` or `image_missing`, with every reason and its remedy;
            `output_unwritable`, `path_outside`.
    """

    def remedy(folder: str, name: str) -> str:
        return missing_file_remedy(folder, name, folders)

    prompt, strangers = _without_strangers(workflow.to_prompt(), nodes)
    checked = validate(prompt, nodes, folders, remedy=remedy)
    if checked.error is not None:
        types = (node["class_type"] for node in prompt.values())
        raise _error(
            checked, nodes, folders, unknown=[name for name in dict.fromkeys(types) if name not in nodes]
        )
    left_out = tuple(f"left out: {line}" for line in (*strangers, *_lines(checked)))
    sent = tuple(
        f"node {key} ({SENDS}) saves nothing: its pictures go to clients of usoflow serve alone"
        for key in checked.outputs
        if checked.prompt[key]["class_type"] == SENDS
    )
    if any(checked.prompt[key]["class_type"] == SAVES for key in checked.outputs):
        check_writable(folders.output)
    check_names(checked)
    valid = replace(workflow, prompt=Prompt.parse(checked.prompt), warnings=())
    return Job(valid, checked.outputs, folders, workflow.warnings + left_out + sent)


def _without_strangers(prompt: Json, nodes: NodeRegistry) -> tuple[Json, list[str]]:
    """The prompt without nodes of unknown types that no known output needs, and a line about each of these.

    Extensions of the editor leave such nodes in workflows. Where no output is known nothing is left out.
    """
    pending = [key for key, node in prompt.items() if _is_output(node["class_type"], nodes)]
    if not pending:
        return prompt, []
    needed: set[str] = set()
    while pending:
        key = pending.pop()
        if key in prompt and key not in needed:
            needed.add(key)
            schema = nodes.schema(prompt[key]["class_type"])
            inputs = prompt[key]["inputs"].items()
            taken = (value for name, value in inputs if schema is None or schema.input(name))
            pending += [link[0] for value in taken if (link := link_of(value))]
    kept = {key: node for key, node in prompt.items() if key in needed or node["class_type"] in nodes}
    left = [
        f"node {key} of the unknown type {node['class_type']}, which no output needs"
        for key, node in prompt.items()
        if key not in kept
    ]
    return kept, left


def _is_output(class_type: str, nodes: NodeRegistry) -> bool:
    schema = nodes.schema(class_type)
    return schema is not None and schema.output_node


def check_names(checked: ValidationResult) -> None:
    """Whether pictures can be saved under the names of a valid prompt, before minutes are spent on them.

    Raises:
        UsoflowError: `path_outside`, `prompt_invalid`.
    """
    for key in checked.outputs:
        node = checked.prompt[key]
        prefix = node["inputs"].get(FILE_NAME)
        if node["class_type"] != SAVES or not isinstance(prefix, str):  # what a link gives is not known yet
            continue
        try:
            check_prefix(fill_placeholders(prefix, datetime.now(), lambda node, widget: None))
        except UsoflowError as error:
            what = f"{SAVES} (node {key}): {error.detail}"
            raise UsoflowError(error.code, what, remedy=error.remedy) from None


def _error(
    checked: ValidationResult, nodes: NodeRegistry, folders: Folders, *, unknown: list[str]
) -> UsoflowError:
    """The error of a prompt of which nothing can be run: every reason, and what to do about it."""
    assert checked.error is not None
    lines = list(_lines(checked)) or [_sentence(checked.error)]
    if unknown[1:]:  # as ComfyUI, the validator names the first
        lines.append(f"Nor are there nodes of the types {', '.join(unknown[1:])}.")
    remedies = list(dict.fromkeys(_remedies(checked, nodes)))
    pulls = [line for line in remedies if PULLS in line]
    others = _other_files(checked, nodes, folders)
    at_once = [f"To run it with the files you have, add: --set {' '.join(others)}"] if len(others) > 1 else []
    remedies = [line for line in remedies if line not in pulls] + pulls + at_once  # for all files: last
    return UsoflowError(_code(checked), "\n".join(lines), remedy="\n".join(remedies) or None)


def _other_files(checked: ValidationResult, nodes: NodeRegistry, folders: Folders) -> list[str]:
    """What is set where each file of the tutorial that is missing has one of its kind here."""
    found = []
    for node_id, entry in checked.node_errors.items():
        for error in entry["errors"]:
            told = error["extra_info"]
            spec = nodes[entry["class_type"]].schema.input(told.get("input_name", ""))
            if not (told.get("remedy") and spec and isinstance(spec.kind, ModelFile)):
                continue
            wanted = known_file(spec.kind.folder, str(told.get("received_value")))
            other = next(same_kind(wanted, folders), None) if wanted else None
            if other is None:
                return []
            found.append(quoted(f"{node_id}.{spec.name}={other}"))
    return found


def _code(checked: ValidationResult) -> str:
    """What is missing decides about the exit code: a picture if that is all, a model if any is."""
    errors = list(_errors(checked))
    if errors and all(error["type"] == "custom_validation_failed" for error in errors):
        return "image_missing"
    return "model_missing" if any("remedy" in error["extra_info"] for error in errors) else "prompt_invalid"


def _lines(checked: ValidationResult) -> Iterator[str]:
    """One line for each thing that is wrong: node, input, reason."""
    for node_id, entry in checked.node_errors.items():
        for error in entry["errors"]:
            yield f"{entry['class_type']} (node {node_id}): {_sentence(error)}"


def _errors(checked: ValidationResult) -> Iterator[dict[str, Any]]:
    for entry in checked.node_errors.values():
        yield from entry["errors"]


def _remedies(checked: ValidationResult, nodes: NodeRegistry) -> Iterator[str]:
    for node_id, entry in checked.node_errors.items():
        for error in entry["errors"]:
            if remedy := error["extra_info"].get("remedy"):
                name = error["extra_info"]["input_name"]
                kind = entry["class_type"]
                yield f"{kind} {node_id}: another file is used with --set {node_id}.{name}=NAME."
                yield from remedy.splitlines()
            elif error["type"] == "value_not_in_list":
                yield f"Another value is set with --set {node_id}.{error['extra_info']['input_name']}=VALUE."
            elif error["type"] == "required_input_missing":
                name = error["extra_info"]["input_name"]
                spec = nodes[entry["class_type"]].schema.input(name)
                if spec is not None and spec.is_widget:
                    yield f"Give it with --set {node_id}.{name}=VALUE."
                    continue
                yield "Where the node before it is muted (Ctrl+M) in the editor, bypass it (Ctrl+B) instead."
            elif error["type"] == "custom_validation_failed" and entry["class_type"] in LOADS:
                yield f"Give the picture with --image {node_id}=PATH, or its folder with --input DIR."
    if checked.error and checked.error["type"] == "prompt_no_outputs":
        yield "Add a SaveImage or PreviewImage in the editor, or make the one that is bypassed active."
    if checked.error and checked.error["type"] == "invalid_prompt":
        yield "Bypass or replace this node in the editor; `usoflow nodes` lists those that there are."


def _sentence(error: dict[str, Any]) -> str:
    details = f": {error['details']}" if error["details"] else ""
    if explained := error["extra_info"].get("explained"):  # in ComfyUI's words a Python exception
        return str(explained)
    return f"{error['message']}{details}"

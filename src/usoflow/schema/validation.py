"""Whether a prompt can be executed: ComfyUI's checks, error types and messages.

Only what an output node needs is checked, and an output whose nodes are all right is executed even if others
are not. Takes decoded JSON as a client sent it; raises nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from usoflow.schema.node import NodeRegistry
from usoflow.schema.object_info import render_input
from usoflow.schema.specs import ANY_TYPE, FileLister, InputSpec, NodeSchema
from usoflow.schema.values import Json, Remedy, bad_link, check_value, error, wrapped


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """`outputs` are the output nodes to execute, `prompt` the prompt with converted values.

    `error` is None if there is at least one; `node_errors` tells what is wrong with the others.
    """

    outputs: tuple[str, ...] = ()
    prompt: Json = field(default_factory=dict)
    error: Json | None = None
    node_errors: Json = field(default_factory=dict)


def validate(
    prompt: object,
    registry: NodeRegistry,
    files: FileLister,
    *,
    targets: Collection[str] | None = None,
    remedy: Remedy | None = None,
) -> ValidationResult:
    """Check a prompt.

    Args:
        targets: execute only these output nodes; default is all.
        remedy: (model folder, file name) -> advice for a model that is not there; added to the error's
            `extra_info` as "remedy".
    """
    if not isinstance(prompt, dict):
        return ValidationResult(error=_not_a_prompt(prompt))
    unusable = _unusable_node(prompt, registry)
    if unusable:
        return ValidationResult(error=unusable)
    nodes = {
        str(key): _Checked(str(key), node, registry[node["class_type"]].schema)
        for key, node in prompt.items()
    }
    outputs = [
        key for key, node in nodes.items() if node.schema.output_node and (targets is None or key in targets)
    ]
    if not outputs:
        return ValidationResult(error=error("prompt_no_outputs", "Prompt has no outputs", ""))
    return _Validator(nodes, files, remedy).run(outputs)


@dataclass(slots=True)
class _Failure:
    """What is an exception in the reference: a link that leads nowhere.

    `explained` says what it is, for whom the words of the exception tell nothing.
    """

    type: str
    message: str
    explained: str


@dataclass(frozen=True, slots=True)
class _Link:
    """What fills an input: the output `slot` of the node `origin`."""

    spec: InputSpec
    origin: str
    slot: int


class _Checked:
    """A node of the prompt and what its own inputs revealed."""

    def __init__(self, key: str, node: Json, schema: NodeSchema) -> None:
        self.key = key
        self.node = node
        self.schema = schema
        inputs = node.get("inputs")
        self.inputs: Json | None = _given(inputs, schema) if isinstance(inputs, dict) else None
        self.values: Json = {}
        self.links: list[_Link] = []  # that lead somewhere
        self.errors: list[Json] = []
        self.failures: list[_Failure] = []
        self.consumer: _Link | None = None  # by which it was asked for first

    def report(self, files: FileLister) -> list[Json]:
        """All errors of this node; failures are worded as seen by the consumer."""
        return self.errors + [self._failure(failure, files) for failure in self.failures]

    def _failure(self, failure: _Failure, files: FileLister) -> Json:
        extra = {"exception_type": failure.type, "traceback": [], "explained": failure.explained}
        if self.consumer is None:
            message = "Exception when validating node"
            return error("exception_during_validation", message, failure.message, **extra)
        spec = self.consumer.spec
        return error(
            "exception_during_inner_validation",
            "Exception when validating inner node",
            failure.message,
            input_name=spec.name,
            input_config=render_input(spec, files),
            exception_message=failure.message,
            **extra,
            linked_node=[self.key, self.consumer.slot],
        )


class _Validator:
    def __init__(self, nodes: dict[str, _Checked], files: FileLister, remedy: Remedy | None) -> None:
        self._nodes = nodes
        self._files = files
        self._remedy = remedy
        self._seen: set[str] = set()

    def run(self, outputs: list[str]) -> ValidationResult:
        good: list[str] = []
        node_errors: Json = {}
        details: list[str] = []
        for output in outputs:
            bad = self._bad_nodes(output)
            for key, errors in bad.items():
                entry = {
                    "errors": errors,
                    "dependent_outputs": [],
                    "class_type": self._nodes[key].schema.class_type,
                }
                node_errors.setdefault(key, entry)["dependent_outputs"].append(output)
            details += [_line(item) for item in bad.get(output, [])]
            if not bad:
                good.append(output)
        if good:
            return ValidationResult(tuple(good), self._converted(), None, node_errors)
        message = "Prompt outputs failed validation"
        failed = error("prompt_outputs_failed_validation", message, "\n".join(details))
        return ValidationResult(error=failed, node_errors=node_errors)

    def _bad_nodes(self, output: str) -> dict[str, list[Json]]:
        """The nodes that an output needs and that have errors."""
        bad: dict[str, list[Json]] = {}
        cycles: dict[str, Json] = {}
        for key in self._needed(output, cycles):
            errors = self._nodes[key].report(self._files)
            if key in cycles:
                errors.append(cycles[key])
            if errors:
                bad[key] = errors
        return bad

    def _needed(self, output: str, cycles: dict[str, Json]) -> list[str]:
        """The output and all it depends on, depth first; fills in where the graph runs in a circle."""
        needed = {output: None}
        path = {output: None}
        stack = [(output, self._links(output))]
        while stack:
            key, links = stack[-1]
            for link in links:
                if link.origin in path:
                    cycles.setdefault(key, _cycle([*path], link.origin, link.spec))
                elif link.origin not in needed:
                    needed[link.origin] = path[link.origin] = None
                    stack.append((link.origin, self._links(link.origin, link)))
                    break
            else:
                stack.pop()
                del path[key]
        return list(needed)

    def _links(self, key: str, consumer: _Link | None = None) -> Iterator[_Link]:
        """The links of a node; checks the node when it is met first."""
        node = self._nodes[key]
        if key not in self._seen:
            self._seen.add(key)
            node.consumer = consumer
            self._check(node)
        return iter(node.links)

    def _check(self, node: _Checked) -> None:
        if node.inputs is None:
            node.failures.append(_Failure("KeyError", "'inputs'", "it has no inputs"))
            return
        for spec in sorted(node.schema.inputs, key=lambda spec: not spec.required):
            if spec.name not in node.inputs:
                if spec.required:
                    message = "Required input is missing"
                    node.errors.append(
                        error("required_input_missing", message, spec.name, input_name=spec.name)
                    )
            elif isinstance(node.inputs[spec.name], list):
                self._check_link(node, spec, node.inputs[spec.name])
            else:
                value, errors = check_value(spec, node.inputs[spec.name], self._files, self._remedy)
                node.values[spec.name] = wrapped(value)
                node.errors += errors

    def _check_link(self, node: _Checked, spec: InputSpec, link: list[Any]) -> None:
        if len(link) != 2 or isinstance(link[1], bool) or not isinstance(link[1], int):
            node.errors.append(bad_link(spec, link, self._files))
            return
        key, slot = link
        origin = self._nodes.get(key) if isinstance(key, str) else None
        if origin is None:
            shown = repr(key)[:100]
            as_text = ", whose id must be a text" if str(key) in self._nodes else ", which is not there"
            explained = f"{spec.name} is linked to node {shown}{as_text}"
            node.failures.append(_Failure("KeyError", shown, explained))
        elif not 0 <= slot < len(origin.schema.outputs):
            there = len(origin.schema.outputs)
            explained = f"{spec.name} is linked to output {slot} of node {key}, which has {there}, from 0 on"
            node.failures.append(_Failure("IndexError", "tuple index out of range", explained))
        else:
            node.links.append(_Link(spec, key, slot))
            received = origin.schema.outputs[slot].type
            if not _fits(received, spec.kind.type):
                node.errors.append(self._mismatch(spec, received, link))

    def _mismatch(self, spec: InputSpec, received: str, link: list[Any]) -> Json:
        return error(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            f"{spec.name}, received_type({received}) mismatch input_type({spec.kind.type})",
            input_name=spec.name,
            input_config=render_input(spec, self._files),
            received_type=received,
            linked_node=link,
        )

    def _converted(self) -> Json:
        """The prompt with the values that the nodes will get."""
        return {
            key: {**node.node, "inputs": {**(node.inputs or {}), **node.values}}
            for key, node in self._nodes.items()
        }


def _given(inputs: Json, schema: NodeSchema) -> Json:
    """The inputs but for null where an optional link could be: clients write out what they leave empty."""
    links = [spec.name for spec in schema.inputs if not (spec.required or spec.is_widget)]
    return {name: value for name, value in inputs.items() if value is not None or name not in links}


def _not_a_prompt(prompt: object) -> Json:
    if isinstance(prompt, list):
        return error("prompt_no_outputs", "Prompt has no outputs", "")
    return error("invalid_prompt", "Cannot execute because the prompt is not an object.", "")


def _unusable_node(prompt: Json, registry: NodeRegistry) -> Json | None:
    """The first node, used or not, whose type is not known."""
    for key, node in prompt.items():
        class_type = node.get("class_type") if isinstance(node, dict) else None
        if not isinstance(class_type, str):
            message = "Cannot execute because a node is missing the class_type property."
        elif class_type not in registry:
            message = f"Cannot execute because node {class_type} does not exist."
        else:
            continue
        return error("invalid_prompt", message, f"Node ID '#{key}'")
    return None


def _cycle(path: list[str], origin: str, spec: InputSpec) -> Json:
    """Links run origin -> ... -> here -> origin; named in the direction of the data."""
    circle = [*path[path.index(origin) :], origin][::-1]
    return error("dependency_cycle", "Dependency cycle detected", " -> ".join(circle), input_name=spec.name)


def _fits(received: str, wanted: str) -> bool:
    """Whether an output of one type may go into an input of another; "A,B" is either, "*" is all."""
    if ANY_TYPE in (received, wanted):
        return True
    return not set(received.split(",")).isdisjoint(wanted.split(","))


def _line(item: Json) -> str:
    return f"{item['message']}: {item['details']}"

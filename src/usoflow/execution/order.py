"""Which nodes of a prompt run, in which order, and the prompt as they see it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from usoflow.errors import UsoflowError
from usoflow.schema.node import NodeRegistry
from usoflow.workflow.prompt import Prompt, link_of
from usoflow.workflow.text import FILE_NAME, fill_placeholders


class NodeError(UsoflowError):
    """An error inside a node, with the node's id and type."""

    def __init__(self, code: str, detail: str, *, remedy: str | None, node_id: str, class_type: str) -> None:
        super().__init__(code, f"{class_type} (node {node_id}): {detail}", remedy=remedy)
        self.node_id = node_id
        self.class_type = class_type


def in_order(prompt: Prompt, targets: Sequence[str], stop_at: Collection[str] = ()) -> Iterator[str]:
    """Ids of the nodes that the targets need, each after those it is linked to.

    The inputs of a node in `stop_at` are not followed. Raises UsoflowError `prompt_invalid` for links in a
    circle, which a valid prompt does not have.
    """
    done: set[str] = set()
    path: set[str] = set()
    stack = [(target, False) for target in reversed(targets)]
    while stack:
        node_id, inputs_done = stack.pop()
        if node_id in done:
            continue
        if inputs_done or node_id in stop_at:
            done.add(node_id)
            yield node_id
            continue
        if node_id in path:  # again, before its inputs are done
            raise UsoflowError("prompt_invalid", f"Links run in a circle through node {node_id}.")
        path.add(node_id)
        stack.append((node_id, True))
        links = [link for value in prompt.nodes[node_id].inputs.values() if (link := link_of(value))]
        stack += [(origin, False) for origin, _ in reversed(links) if origin not in done]


def of_known_inputs(prompt: Prompt, registry: NodeRegistry) -> Prompt:
    """The prompt without what its nodes do not take, whose links nobody has checked."""
    for key, node in prompt.nodes.items():
        if node.class_type not in registry:  # a custom one that was there when the prompt was accepted
            raise NodeError(
                "node_unknown",
                "there is no such node any more.",
                remedy="Put its file back into the folder of --custom-nodes, or leave out the node.",
                node_id=key,
                class_type=node.class_type,
            )
    schemas = {key: registry[node.class_type].schema for key, node in prompt.nodes.items()}
    return Prompt(
        {
            key: replace(node, inputs={n: v for n, v in node.inputs.items() if schemas[key].input(n)})
            for key, node in prompt.nodes.items()
        }
    )


def dated(prompt: Prompt, now: datetime) -> Prompt:
    """The prompt with %date:...% in file names filled in, as the editor does before it sends one."""
    nodes = dict(prompt.nodes)
    for key, node in prompt.nodes.items():
        prefix = node.inputs.get(FILE_NAME)
        if isinstance(prefix, str):
            filled = fill_placeholders(prefix, now, lambda node, widget: None)
            nodes[key] = replace(node, inputs={**node.inputs, FILE_NAME: filled})
    return Prompt(nodes)

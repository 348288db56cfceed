"""UI workflow -> prompt, as the official editor converts it when one presses Run.

Subgraphs are expanded (a node inside gets the id "112:31"), bypassed and muted nodes and nodes that only the
editor knows are resolved away. Which value an input gets: its link's, else its field's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from usoflow.errors import UsoflowError
from usoflow.schema.node import NodeRegistry
from usoflow.schema.values import wrapped
from usoflow.workflow import text, widgets
from usoflow.workflow.document import (
    BYPASSED,
    INPUT_NODE,
    MUTED,
    OUTPUT_NODE,
    Document,
    DocumentNode,
    Graph,
    InputSlot,
    Link,
    Subgraph,
)
from usoflow.workflow.host_fields import host_values, shown_fields
from usoflow.workflow.prompt import Prompt, PromptNode, link_of

REROUTES: Final = ("Reroute", "Reroute (rgthree)")
# Of the extensions KJNodes and Easy-Use: links without a line. What goes into a setter comes out of the
# getters that hold its name.
SETTERS: Final = ("SetNode", "easy setNode")
GETTERS: Final = ("GetNode", "easy getNode")
PRIMITIVE: Final = "PrimitiveNode"
GROUP_NODES: Final = ("workflow>", "workflow/")  # how the types of old files begin that are no subgraphs yet
EDITOR_NODES: Final = (REROUTES[0], PRIMITIVE, "Note", "MarkdownNote")
NEVER_SENT: Final = (*EDITOR_NODES, *REROUTES, *SETTERS, *GETTERS)  # nodes that only an editor knows
MAX_NODES: Final = 100_000  # subgraphs in subgraphs multiply; a small file can unfold without end


@dataclass(frozen=True, slots=True)
class Conversion:
    """The prompt, and what a user should know about how it was made."""

    prompt: Prompt
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Scope:
    """One level: the top, or one use of a subgraph by the node `host` of the level `parent`."""

    graph: Graph
    prefix: str = ""
    host: DocumentNode | None = None
    subgraph: Subgraph | None = None
    parent: _Scope | None = None

    def uses(self, subgraph: Subgraph) -> bool:
        """Whether this level lies within a use of the subgraph."""
        scope: _Scope | None = self
        while scope is not None:
            if scope.subgraph is subgraph:
                return True
            scope = scope.parent
        return False


@dataclass(frozen=True, slots=True)
class _Value:
    """A link that ends in a plain value: a primitive's, or, `as_it_is`, a field of a subgraph's node.

    In the latter the editor (1.58.1) resolves neither comments nor alternatives.
    """

    value: Any
    as_it_is: bool = False


_Source = list[Any] | _Value | None  # [node id, output index], a value, or nothing


def flatten(document: Document, registry: NodeRegistry, *, now: datetime | None = None) -> Conversion:
    """Convert a workflow.

    Args:
        registry: tells the fields of the node types; other types are converted from the file alone.
        now: for %date:...% in file names; default is the present.

    Raises UsoflowError("workflow_invalid") for links in a circle, "subgraph_recursive".
    """
    return _Flattener(document, registry, now or datetime.now()).run()


def all_nodes(document: Document) -> dict[str, str]:
    """Types of all nodes but the editor's own, whether or not they are active, by their id in a prompt.

    The type of a node that stands for a subgraph is the subgraph's name.
    """
    return {
        scope.prefix + node.id: _type(document, node)
        for scope in _levels(document, whole=True)
        for node in scope.graph.nodes.values()
        if node.type not in NEVER_SENT
    }


def hosts(document: Document) -> dict[str, PromptNode]:
    """The active nodes that stand for subgraphs, by the id that they would have in a prompt.

    Their inputs are the fields that they show: by name, the id and input of each node within that gets it.
    """
    found: dict[str, PromptNode] = {}
    for scope in reversed(list(_levels(document))):  # what is within comes first
        host, subgraph = scope.host, scope.subgraph
        if host is None or subgraph is None:
            continue
        fields: dict[str, list[tuple[str, str]]] = {name: [] for name in subgraph.inputs}
        for (node, name), shown in shown_fields(subgraph).items():
            key = scope.prefix + node
            if key in found:
                fields[shown] += found[key].inputs.get(name, ())
            elif not subgraph.graph.nodes[node].skipped:
                fields[shown].append((key, name))
        type_ = _type(document, host)
        leading = {name: places for name, places in fields.items() if places}
        found[scope.prefix.removesuffix(":")] = PromptNode(type_, leading, host.title or type_)
    return found


def _type(document: Document, node: DocumentNode) -> str:
    """A node's type; of one that stands for a subgraph, the subgraph's name."""
    subgraph = document.subgraphs.get(node.type)
    return node.type if subgraph is None else subgraph.name or subgraph.id


def _levels(document: Document, *, whole: bool = False) -> Iterator[_Scope]:
    """The top and every use of a subgraph.

    A muted or bypassed one is only left out at the top, and not if `whole`: inside a subgraph its nodes are
    unfolded all the same (nothing then links to them).
    """
    pending = [_Scope(document.graph)]
    unfolded = 0
    while pending:
        scope = pending.pop()
        unfolded += 1 + len(scope.graph.nodes)
        if unfolded > MAX_NODES:
            raise UsoflowError("workflow_invalid", f"the workflow unfolds to more than {MAX_NODES} nodes")
        yield scope
        for node in scope.graph.nodes.values():
            subgraph = document.subgraphs.get(node.type)
            if subgraph and (whole or scope.parent or not node.skipped):
                pending.append(_inside(scope, node, subgraph))


class _Flattener:
    def __init__(self, document: Document, registry: NodeRegistry, now: datetime) -> None:
        self._document = document
        self._registry = registry
        self._now = now
        self._warnings: dict[str, None] = {}  # in order, each once
        self._shown: dict[str, dict[str, Any]] = {}  # by the prefix of a subgraph's nodes, its `host_values`
        self._stored: dict[str, dict[str, Any]] = {}  # by id, what a node's fields hold, linked ones too

    def run(self) -> Conversion:
        nodes = {scope.prefix + node.id: self._convert(scope, node) for scope, node in self._executable()}
        prompt = Prompt({key: _without_dangling(node, nodes) for key, node in nodes.items()})
        return Conversion(self._with_file_names(prompt), tuple(self._warnings))

    # --- which nodes -----------------------------------------------------------------------------------

    def _executable(self) -> Iterator[tuple[_Scope, DocumentNode]]:
        """All nodes that go into the prompt."""
        for scope in _levels(self._document):
            for node in scope.graph.nodes.values():
                if self._is_executed(node):
                    yield scope, node

    # --- what they get ---------------------------------------------------------------------------------

    def _convert(self, scope: _Scope, node: DocumentNode) -> PromptNode:
        schema = self._registry.schema(node.type)
        if schema:
            inputs = widgets.known_values(node, schema)
        else:
            _refuse_group(scope.prefix + node.id, node.type)
            self._warn(f"node {scope.prefix + node.id}: there is no node type {node.type}")
            inputs = widgets.guessed_values(node)
        self._stored[scope.prefix + node.id] = dict(inputs)
        as_they_are = set()
        for slot in node.inputs:
            source = self._input(scope, slot)
            if isinstance(source, _Value):
                inputs[slot.name] = wrapped(source.value)
                as_they_are |= {slot.name} if source.as_it_is else set()
            elif source is not None:
                inputs[slot.name] = source
        for name, value in inputs.items():
            if isinstance(value, str) and widgets.is_dynamic(schema, name) and name not in as_they_are:
                inputs[name] = self._resolved_text(value, f"node {scope.prefix + node.id}, {name}")
        title = node.title or (schema.display_name if schema else None) or node.type
        return PromptNode(node.type, inputs, title)

    def _resolved_text(self, value: str, where: str) -> str:
        told = text.strip_comments(value)
        if "://" in value and told != value:
            self._warn(f"{where}: // begins a comment, in an address too, and what follows is left out")
        resolved, chosen = text.first_alternatives(told)
        if chosen:
            self._warn(f"{where}: of the alternatives in braces, the first is taken")
        return resolved

    # --- where links come from -------------------------------------------------------------------------

    def _input(self, scope: _Scope, slot: InputSlot) -> _Source:
        """What reaches an input, through everything that is not executed itself."""
        seen: set[tuple[str, str]] = set()
        place: tuple[_Scope, Link | None, str] | _Value | None = (scope, _link(scope, slot), slot.type)
        while isinstance(place, tuple):
            here, link, wanted = place
            if link is None:
                return None
            step = (here.prefix, f"{link.origin}.{link.origin_slot}")
            if step in seen:
                raise UsoflowError(
                    "workflow_invalid", f"links run in a circle through node {here.prefix}{link.origin}"
                )
            seen.add(step)
            origin = here.graph.nodes.get(link.origin)
            if origin is not None and self._is_executed(origin):
                return [here.prefix + origin.id, link.origin_slot]
            place = self._behind(here, link, origin, wanted)
        return place

    def _is_executed(self, node: DocumentNode) -> bool:
        return not (node.skipped or node.type in NEVER_SENT or node.type in self._document.subgraphs)

    def _behind(
        self, scope: _Scope, link: Link, origin: DocumentNode | None, wanted: str
    ) -> tuple[_Scope, Link | None, str] | _Value | None:
        """One step back from a link whose origin is not executed."""
        if origin is None:
            return self._host_input(scope, link.origin_slot, wanted) if link.origin == INPUT_NODE else None
        if origin.type == PRIMITIVE:
            return None if (value := _held(origin)) is None else _Value(value)
        if origin.mode == MUTED:
            return None
        if origin.type in GETTERS:
            return self._behind_setter(scope, _held(origin), wanted)
        if origin.type in (*REROUTES, *SETTERS) or origin.mode == BYPASSED:
            slot = _bypass(origin, link.origin_slot, wanted)
            return (scope, _link(scope, slot), wanted) if slot else None
        subgraph = self._document.subgraphs.get(origin.type)
        if subgraph is None:
            return None
        return _inside(scope, origin, subgraph), _output_link(subgraph.graph, link.origin_slot), wanted

    def _behind_setter(self, scope: _Scope, name: Any, wanted: str) -> tuple[_Scope, Link | None, str] | None:
        """The link into the setter of this name, of this level or the nearest around it."""
        level: _Scope | None = scope
        while level is not None and name is not None:
            for node in level.graph.nodes.values():
                if node.type in SETTERS and node.mode != MUTED and node.inputs and _held(node) == name:
                    return level, _link(level, node.inputs[0]), wanted
            level = level.parent
        unset = "a node gets a value of no name" if name is None else f"no node sets {name!r}, which one gets"
        self._warn(unset)
        return None

    def _host_input(
        self, scope: _Scope, index: int, wanted: str
    ) -> tuple[_Scope, Link | None, str] | _Value | None:
        """Outside of a subgraph: the link into its node, else the value of the field that its node shows."""
        host, subgraph, parent = scope.host, scope.subgraph, scope.parent
        if host is None or subgraph is None or parent is None or not 0 <= index < len(subgraph.inputs):
            return None
        name = subgraph.inputs[index]
        links = (_link(parent, slot) for slot in host.inputs if slot.name == name)  # some files have two
        link = next((link for link in links if link is not None), None)
        if link is not None:
            return parent, link, wanted
        if scope.prefix not in self._shown:
            self._shown[scope.prefix] = host_values(host, subgraph)
        values = self._shown[scope.prefix]
        return _Value(values[name], as_it_is=True) if name in values else None

    # --- file names ------------------------------------------------------------------------------------

    def _fields_by_name(self, prompt: Prompt) -> Mapping[str, Mapping[str, Any]]:
        """What %Node.widget% may ask for: by "Node name for S&R", else by title; of two nodes the first.

        Of a field that a link feeds, what it holds itself.
        """
        search_names: dict[str, Mapping[str, Any]] = {}
        titles: dict[str, Mapping[str, Any]] = {}
        for scope in _levels(self._document):
            for node in scope.graph.nodes.values():
                key = scope.prefix + node.id
                if executed := prompt.nodes.get(key):
                    linked = {name for name, value in executed.inputs.items() if link_of(value)}
                    held = {name: value for name, value in self._stored[key].items() if name in linked}
                    fields, title = {**executed.inputs, **held}, executed.title
                elif node.type == PRIMITIVE and (value := _held(node)) is not None:
                    fields, title = {"value": value}, node.title or "Primitive"
                else:
                    continue
                search_names.setdefault(node.search_name, fields)
                titles.setdefault(title, fields)
        return titles | search_names

    def _with_file_names(self, prompt: Prompt) -> Prompt:
        """Fill %date:...% and %Node.widget% in the `filename_prefix` fields."""
        fields = self._fields_by_name(prompt)

        def lookup(node: str, widget: str) -> str | None:
            value = fields.get(node, {}).get(widget)
            if value is None or isinstance(value, list | dict):
                self._warn(f"filename_prefix: there is no {node}.{widget}")
                return None
            return text.as_the_editor_writes(value)

        nodes = dict(prompt.nodes)
        for key, node in prompt.nodes.items():
            prefix = node.inputs.get(text.FILE_NAME)
            if isinstance(prefix, str) and "%" in prefix:
                filled = text.fill_placeholders(prefix, self._now, lookup)
                nodes[key] = replace(node, inputs={**node.inputs, text.FILE_NAME: filled})
        return Prompt(nodes)

    def _warn(self, message: str) -> None:
        self._warnings[message] = None


def _held(node: DocumentNode) -> Any:
    """The value of a PrimitiveNode, the name of a setter or getter; None if it has none."""
    return next(iter(node.values or node.named_values.values()), None)


def _inside(scope: _Scope, host: DocumentNode, subgraph: Subgraph) -> _Scope:
    if scope.uses(subgraph):
        raise UsoflowError("subgraph_recursive", f"subgraph {subgraph.name or subgraph.id} contains itself")
    return _Scope(subgraph.graph, f"{scope.prefix}{host.id}:", host, subgraph, scope)


def _link(scope: _Scope, slot: InputSlot) -> Link | None:
    return None if slot.link is None else scope.graph.links.get(slot.link)


def _output_link(graph: Graph, index: int) -> Link | None:
    """The link into a subgraph's output."""
    into = (link for link in graph.links.values() if link.target == OUTPUT_NODE and link.target_slot == index)
    return next(into, None)


def _bypass(node: DocumentNode, index: int, wanted: str) -> InputSlot | None:
    """The input that stands in for an output of a bypassed node: the one of the same index if its type fits,
    else the first of exactly the wanted type, else the first that fits."""
    offered = node.output_types[index] if 0 <= index < len(node.output_types) else wanted
    same = node.inputs[index] if 0 <= index < len(node.inputs) else None
    if same and fits(same.type, offered) and fits(same.type, wanted):
        return same
    exact = next((slot for slot in node.inputs if slot.type == wanted), None)
    return exact or next((slot for slot in node.inputs if fits(slot.type, wanted)), None)


def fits(one: str, other: str) -> bool:
    """Whether two socket types may be linked: "*" takes all; "A,B" is either."""
    if "*" in (one, other):
        return True
    return not set(one.upper().split(",")).isdisjoint(other.upper().split(","))


def _refuse_group(key: str, type_: str) -> None:
    """Group nodes, which subgraphs have replaced, are types of the file's own."""
    if type_.startswith(GROUP_NODES):
        raise UsoflowError(
            "workflow_invalid",
            f"node {key} is a group node ({type_[len(GROUP_NODES[0]) :]})",
            remedy="Convert the group node to a subgraph in the editor, and save the workflow again.",
        )


def _without_dangling(node: PromptNode, nodes: dict[str, PromptNode]) -> PromptNode:
    """Drop links to nodes that are not in the prompt."""
    kept = {name: value for name, value in node.inputs.items() if _exists(value, nodes)}
    return replace(node, inputs=kept)


def _exists(value: Any, nodes: dict[str, PromptNode]) -> bool:
    link = link_of(value)
    return link is None or link[0] in nodes

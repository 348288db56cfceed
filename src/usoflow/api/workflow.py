"""A workflow to be changed, run and saved: prompt, UI graph, and the pictures that it is given."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from usoflow.api.saving import save
from usoflow.errors import UsoflowError
from usoflow.schema.node import NodeRegistry
from usoflow.schema.specs import Choice, InputImage, InputSpec, ModelFile, Text
from usoflow.schema.values import image_location
from usoflow.settings import expanded
from usoflow.workflow.prompt import Prompt, PromptNode, link_of, no_input

Field = tuple[str, str]  # a node's id in the prompt, and the name of its input
WorkflowSource = str | Path | bytes | Mapping[str, Any]  # a file, what it holds, or decoded JSON

SEEDS: Final = ("seed", "noise_seed")
NOT_SHOWN: Final = (
    "No field of the editor can show the change of {}: the pictures carry the prompt, not the UI graph."
)


@dataclass(frozen=True)
class Workflow:
    """Immutable: what changes it returns a changed copy.

    Attributes:
        prompt: what is executed.
        ui: the UI graph that shows the same in the editor, embedded in the pictures that are saved; None for
            an API prompt, and where a change cannot be shown by a field.
        pictures: files given for LoadImage nodes, by the name that the prompt uses.
        source: the file it was loaded from, whose folder is searched for pictures last.
        warnings: what the conversion from the UI graph found odd.
        nodes: the node types that there are; None is usoflow's own.
    """

    prompt: Prompt = field(repr=False)
    ui: Mapping[str, Any] | None = field(default=None, repr=False)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    source: Path | None = None
    warnings: tuple[str, ...] = ()
    nodes: NodeRegistry | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, file: WorkflowSource, *, nodes: NodeRegistry | None = None) -> Self:
        """Read a workflow or prompt JSON, a picture that carries one, or "template:NAME".

        Bytes are those of such a file, a mapping is decoded JSON.
        `nodes` are the node types that there are, where there are more than usoflow's own (`Engine.nodes`).

        Raises:
            UsoflowError: `file_not_found`, `template_unknown`, `not_a_workflow`, `workflow_invalid`,
                `prompt_invalid`, `subgraph_recursive`.
        """
        from usoflow.nodes import registry
        from usoflow.workflow.loading import TEMPLATE, load, load_bytes, load_value

        source = None
        if isinstance(file, bytes):
            loaded = load_bytes(file, nodes or registry())
        elif isinstance(file, str | os.PathLike):
            loaded = load(file, nodes or registry())
            source = None if str(file).startswith(TEMPLATE) else expanded(file)
        else:
            loaded = load_value(file, nodes or registry())
        others = None if nodes is registry() else nodes  # without them it can be sent to another process
        return cls(loaded.prompt, loaded.workflow, source=source, warnings=loaded.warnings, nodes=others)

    def set(self, target: str, value: object) -> Self:
        """With another value for an input, named "NODE.INPUT"; NODE is an id, title or type.

        NODE may stand for a subgraph; INPUT is then a field that it shows.
        The UI graph changes with the prompt: in the editor the field shows the new value.

        Raises:
            UsoflowError: `set_invalid`.
        """
        node, dot, name = target.rpartition(".")
        if not dot:
            raise UsoflowError("set_invalid", f"{target!r} is not NODE.INPUT")
        return self._with(dict.fromkeys(self._targets(node, name), value))

    def assign(self, text: str) -> Self:
        """`set` from the text "NODE.INPUT=VALUE", whose value is read as the input's kind asks for.

        Raises:
            UsoflowError: `set_invalid`.
        """
        target, equals, word = text.partition("=")
        node, dot, name = target.rpartition(".")
        if not equals or not dot:
            raise UsoflowError("set_invalid", f"{text!r} is not NODE.INPUT=VALUE")
        fields = self._targets(node, name)
        value = word if self._is_text(*fields[0]) else _decoded(word)
        return self._with(dict.fromkeys(fields, value))

    def with_picture(self, node: str, file: str | Path) -> Self:
        """With this picture for a LoadImage node, wherever the file is.

        Raises:
            UsoflowError: `set_invalid`, `image_missing`.
        """
        path = expanded(file)
        check_picture(path)
        fields = self._targets(node, "image")
        others = {
            str(entry.inputs.get("image"))
            for key, entry in self.prompt.nodes.items()
            if (key, "image") not in fields
        }
        others -= {name for name, given in self.pictures.items() if given.resolve() == path.resolve()}
        name = free_name(path.name, others)
        given = replace(self, pictures={**self.pictures, name: path})
        return given._with(dict.fromkeys(fields, name))

    def with_seed(self, seed: int) -> Self:
        """With the seed of every sampler set, also where it is the number of a PrimitiveInt.

        Warns of those that other nodes make.

        Raises:
            UsoflowError: `set_invalid` if there is none that can be set.
        """
        links = {place: link_of(value) for place, value in self._seeds().items()}
        own = {place: seed for place, link in links.items() if link is None}
        changing = {key for key, _ in own}  # what they give changes too
        left = ", ".join(".".join(place) for place, link in links.items() if link and link[0] not in changing)
        if not own:
            what = f"another node gives {left}: set it there" if left else "there is no seed to set"
            remedy = "Leave out the seed, or set what makes it: --set NODE.INPUT=VALUE."
            raise UsoflowError("set_invalid", what, remedy=remedy)
        changed = self._with(own)
        kept = f"The seed does not change {left}: another node gives it."
        return replace(changed, warnings=(*changed.warnings, kept)) if left else changed

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its samplers, each once."""
        return tuple(dict.fromkeys(seed for seed in self._seeds().values() if isinstance(seed, int)))

    def _seeds(self) -> dict[Field, Any]:
        """The seeds by the node and input that has them: numbers, or links to the nodes that make them."""
        nodes, found = self.prompt.nodes, {}
        for key, node in nodes.items():
            for name in (name for name in SEEDS if name in node.inputs):
                place, value = (key, name), node.inputs[name]
                link = link_of(value)
                origin = nodes.get(link[0]) if link else None
                if link and origin and origin.class_type == "PrimitiveInt":
                    place, value = (link[0], "value"), origin.inputs.get("value")
                found[place] = value
        return found

    def to_prompt(self) -> dict[str, Any]:
        """The prompt in the form that ComfyUI's API takes."""
        return self.prompt.to_json()

    def save(self, file: str | Path) -> None:
        """Write JSON that ComfyUI and usoflow open.

        The UI graph if there is one, else the prompt.

        Raises:
            UsoflowError: `output_unwritable`.
        """
        data = self.to_prompt() if self.ui is None else self.ui
        text = json.dumps(data, indent=2, ensure_ascii=False)
        save(file, text.encode(errors="backslashreplace"))  # a lone surrogate: JSON's escape

    def _targets(self, node: str, name: str) -> Sequence[Field]:
        """The inputs of the prompt that are meant: one, or those behind a field of a subgraph's node."""
        try:
            return [(self.prompt.find(node), name)]
        except UsoflowError:
            if self.ui is None:
                raise
            return self._shown_targets(self.ui, node, name)

    def _shown_targets(self, ui: Mapping[str, Any], node: str, name: str) -> Sequence[Field]:
        """The same for a node that the editor shows and the prompt does not have."""
        from usoflow.workflow.document import parse
        from usoflow.workflow.flatten import all_nodes, hosts

        document = parse(ui)
        shown = {**self.prompt.nodes, **hosts(document)}
        try:
            key = Prompt(shown).find(node)
        except UsoflowError:
            if (kind := _skipped(all_nodes(document), shown).get(node)) is None:
                raise
            raise UsoflowError(
                "set_invalid",
                f"node {node} ({kind}) is bypassed or muted in this workflow",
                remedy="Make it active in the editor (Ctrl+B, Ctrl+M), save, and run that.",
            ) from None
        fields = [field for field in shown[key].inputs.get(name, ()) if field[0] in self.prompt.nodes]
        if not fields:
            raise no_input(key, shown[key], name, shown[key].inputs)
        return fields

    def _is_text(self, key: str, name: str) -> bool:
        """Whether an input takes any word as it is; of an unknown one, what it holds now tells."""
        node = self.prompt.nodes[key]
        schema = self._registry().schema(node.class_type)
        spec = schema.input(name) if schema else None
        return isinstance(node.inputs.get(name), str) if spec is None else _takes_text(spec)

    def _with(self, values: Mapping[Field, object]) -> Self:
        """With other values, by node id and input, in the prompt and in the UI graph."""
        prompt = self._set(values)
        if self.ui is None or not values:
            return replace(self, prompt=prompt)
        from usoflow.workflow.editing import with_values

        stored = {(key, name): prompt.nodes[key].inputs[name] for key, name in values}
        edited = with_values(self.ui, stored, self._registry())
        if edited is None:
            lost = NOT_SHOWN.format(", ".join(".".join(field) for field in values))
            return replace(self, prompt=prompt, ui=None, warnings=(*self.warnings, lost))
        changed = replace(self, prompt=prompt, ui=edited.workflow)
        return replace(changed, prompt=changed._set(edited.file_names))

    def _set(self, values: Mapping[Field, object]) -> Prompt:
        prompt = self.prompt
        for (key, name), value in values.items():
            prompt = prompt.set(key, name, plain(value), optional=self._fields(key))
        return prompt

    def _fields(self, key: str) -> tuple[str, ...]:
        """What can be set of a node, whether or not the prompt does."""
        entry = self._registry().get(self.prompt.nodes[key].class_type)
        return tuple(spec.name for spec in entry.schema.inputs if spec.is_widget) if entry else ()

    def _registry(self) -> NodeRegistry:
        from usoflow.nodes import registry

        return registry() if self.nodes is None else self.nodes


def _skipped(types: Mapping[str, str], shown: Mapping[str, PromptNode]) -> Mapping[str, str]:
    """Types of the nodes that are not active, by id and by type."""
    absent = {key: kind for key, kind in types.items() if key not in shown}
    kinds = set(absent.values()) - {node.class_type for node in shown.values()}
    return {kind: kind for kind in kinds} | absent


def _takes_text(spec: InputSpec) -> bool:
    if isinstance(spec.kind, Choice):
        return all(isinstance(option, str) for option in spec.kind.options)
    return isinstance(spec.kind, Text | ModelFile | InputImage)


def _decoded(text: str) -> Any:
    """What JSON means by it, if it is JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy and torch become Python's, also those of a pair of any kind."""
    if isinstance(value, tuple | list):
        parts = [plain(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", None) == () else value


def check_picture(path: Path, remedy: str = "Check the path.") -> None:
    """Whether a picture that somebody names is there.

    Raises:
        UsoflowError: `image_missing`.
    """
    if not os.path.isfile(path):
        reason = "is not a file" if os.path.exists(path) else "does not exist or cannot be read"
        if path.parts[:1] in (("http:",), ("https:",)):
            reason = "is an address: download the picture first"
        raise UsoflowError("image_missing", f"{path} {reason}.", remedy=remedy)


def free_name(name: str, taken: Container[object]) -> str:
    """The name, with a number before it if it is taken; without an ending that would mean another folder."""
    _, name = image_location(name)
    numbered = (f"{number}_{name}" for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in taken)

"""A workflow to be changed, run and saved: prompt, UI graph, and the pictures that it is given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from usoflow.errors import UsoflowError
from usoflow.schema.node import NodeRegistry
from usoflow.workflow.prompt import Prompt, link_of

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

    prompt: Prompt
    ui: Mapping[str, Any] | None = None
    pictures: Mapping[str, Path] = field(default_factory=dict)
    source: Path | None = None
    warnings: tuple[str, ...] = ()
    nodes: NodeRegistry | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, file: str | Path | Mapping[str, Any], *, nodes: NodeRegistry | None = None) -> Self:
        """Read a workflow or prompt JSON, a picture that carries one, or "template:NAME".

        JSON that is in memory already is taken as it is.
        `nodes` are the node types that there are, where there are more than usoflow's own (`Engine.nodes`).

        Raises:
            UsoflowError: `file_not_found`, `template_unknown`, `not_a_workflow`, `workflow_invalid`,
                `prompt_invalid`, `subgraph_recursive`.
        """
        from usoflow.nodes import registry
        from usoflow.workflow.loading import TEMPLATE, load, load_json

        if isinstance(file, Mapping):
            loaded, source = load_json(dict(file), nodes or registry()), None
        else:
            loaded = load(file, nodes or registry())
            source = None if str(file).startswith(TEMPLATE) else Path(file).expanduser()
        others = None if nodes is registry() else nodes  # without them it can be sent to another process
        return cls(loaded.prompt, loaded.workflow, source=source, warnings=loaded.warnings, nodes=others)

    def set(self, target: str, value: object) -> Self:
        """With another value for an input, named "NODE.INPUT"; NODE is an id, title or type.

        The UI graph changes with the prompt: in the editor the field shows the new value.

        Raises:
            UsoflowError: `set_invalid`.
        """
        node, dot, name = target.rpartition(".")
        if not dot:
            raise UsoflowError("set_invalid", f"{target!r} is not NODE.INPUT")
        return self._with({(self._find(node), name): value})

    def assign(self, text: str) -> Self:
        """`set` from the text "NODE.INPUT=VALUE", whose value is read as the input's kind asks for.

        Raises:
            UsoflowError: `set_invalid`.
        """
        node, dot, _ = text.partition("=")[0].rpartition(".")
        if dot:
            self._find(node)
        key, name, value = self.prompt.assignment(text)
        return self._with({(key, name): value})

    def with_picture(self, node: str, file: str | Path) -> Self:
        """With this picture for a LoadImage node, wherever the file is.

        Raises:
            UsoflowError: `set_invalid`, `image_missing`.
        """
        path = Path(file).expanduser()
        check_picture(path)
        key = self._find(node)
        others = [entry.inputs.get("image") for other, entry in self.prompt.nodes.items() if other != key]
        name = free_name(path.name, others)
        given = replace(self, pictures={**self.pictures, name: path})
        return given._with({(key, "image"): name})

    def with_seed(self, seed: int) -> Self:
        """With the seed of every sampler set, also where it is the number of a PrimitiveInt.

        Raises:
            UsoflowError: `set_invalid` if all seeds come from other nodes.
        """
        own = self._seeds()
        elsewhere = [key for key, node in self.prompt.nodes.items() if any(s in node.inputs for s in SEEDS)]
        if elsewhere and not own:
            raise UsoflowError(
                "set_invalid", f"the seed of node {elsewhere[0]} comes from another node: set it there"
            )
        return self._with(dict.fromkeys(own, seed))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its samplers, each once."""
        return tuple(dict.fromkeys(self._seeds().values()))

    def _seeds(self) -> dict[tuple[str, str], int]:
        """The seeds by the node and input that has the number."""
        nodes, found = self.prompt.nodes, {}
        for key, node in nodes.items():
            for name in SEEDS:
                place, value = (key, name), node.inputs.get(name)
                link = link_of(value)
                origin = nodes.get(link[0]) if link else None
                if link and origin and origin.class_type == "PrimitiveInt":
                    place, value = (link[0], "value"), origin.inputs.get("value")
                if isinstance(value, int):
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
        try:
            Path(file).expanduser().write_bytes(
                text.encode(errors="backslashreplace")
            )  # a lone surrogate: JSON's escape
        except OSError as reason:
            what = f"{file} cannot be written: {reason.strerror}."
            raise UsoflowError("output_unwritable", what) from None

    def _find(self, node: str) -> str:
        """The id of a node of the prompt; tells of one that the editor shows and the prompt does not have."""
        try:
            return self.prompt.find(node)
        except UsoflowError:
            if (kind := self._skipped().get(node)) is None:
                raise
            raise UsoflowError(
                "set_invalid",
                f"node {node} ({kind}) is bypassed or muted in this workflow",
                remedy="Make it active in the editor (Ctrl+B, Ctrl+M), save, and run that.",
            ) from None

    def _skipped(self) -> Mapping[str, str]:
        """Types of the nodes that the editor shows and the prompt does not have, by id and by type."""
        if self.ui is None:
            return {}
        from usoflow.workflow.document import parse
        from usoflow.workflow.flatten import all_nodes

        nodes = self.prompt.nodes
        absent = {key: kind for key, kind in all_nodes(parse(self.ui)).items() if key not in nodes}
        kinds = set(absent.values()) - {node.class_type for node in nodes.values()}
        return {kind: kind for kind in kinds} | absent

    def _with(self, values: Mapping[tuple[str, str], object]) -> Self:
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

    def _set(self, values: Mapping[tuple[str, str], object]) -> Prompt:
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


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy and torch become Python's, also those of a pair."""
    if isinstance(value, tuple | list):
        return type(value)(plain(part) for part in value)
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", None) == () else value


def check_picture(path: Path) -> None:
    """Whether a picture that somebody names is there.

    Raises:
        UsoflowError: `image_missing`.
    """
    if not path.is_file():
        reason = "is no file" if path.exists() else "does not exist"
        if path.parts[:1] in (("http:",), ("https:",)):
            reason = "is an address: download the picture first"
        raise UsoflowError("image_missing", f"{path} {reason}.", remedy="Check the path.")


def free_name(name: str, taken: Container[object]) -> str:
    """The name, with a number before it if other nodes use it for another picture."""
    numbered = (f"{number}_{name}" for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in taken)

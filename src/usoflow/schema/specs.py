"""Value types that describe a node: its inputs, outputs and how an editor shows them.

Written as `Annotated` metadata in node signatures (`node.py` reads them), rendered by `object_info.py`,
checked by `validation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

ANY_TYPE: Final = "*"  # a socket that takes every type


@dataclass(frozen=True, slots=True)
class Socket:
    """An input that only a link can fill, or an output: "IMAGE", "MODEL", ... or `ANY_TYPE`."""

    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Int:
    """A whole number within [min, max].

    `control_after_generate` makes the editor add a second widget that changes the value after each run;
    it stands in the workflow's `widgets_values` but never in a prompt. `display` asks for another editor
    ("color").
    """

    min: int | None = None
    max: int | None = None
    step: int | None = None
    control_after_generate: bool = False
    display: str | None = None
    type: str = "INT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Float:
    """A number within [min, max]; `step` and `round` only guide the editor."""

    min: float | None = None
    max: float | None = None
    step: float | None = None
    round: float | None = None
    type: str = "FLOAT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text; with `dynamic_prompts` the editor resolves {a|b} and comments before it sends the prompt."""

    multiline: bool = False
    dynamic_prompts: bool = False
    type: str = "STRING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Boolean:
    """True or false."""

    type: str = "BOOLEAN"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `options`; `accepted` values are legal too but not offered (older names, say).

    Options are texts; those of custom nodes may be numbers or booleans too. `control_after_generate` as of
    `Int`.
    """

    options: tuple[Any, ...]
    accepted: tuple[str, ...] = ()
    control_after_generate: bool = False
    type: str = "COMBO"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The name of a file in a model folder ("checkpoints", "loras", ...)."""

    folder: str
    type: str = "COMBO"


@dataclass(frozen=True, slots=True)
class InputImage:
    """The name of a picture in the input folder; the editor adds an upload button."""

    type: str = "COMBO"


Kind = Socket | Int | Float | Text | Boolean | Choice | ModelFile | InputImage
KINDS: Final = (Socket, Int, Float, Text, Boolean, Choice, ModelFile, InputImage)


@dataclass(frozen=True, slots=True)
class Tip:
    """A tooltip, as metadata of an input."""

    text: str


@dataclass(frozen=True, slots=True)
class Optional:
    """Metadata of a widget that a prompt may leave out (its Python default then holds)."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input. `default` is None where there is none.

    `settings` are what a custom node says of it, shown to the editor as they are. With `checked` False the
    node itself finds out whether a value is one of those offered and in its range.
    """

    name: str
    kind: Kind
    default: Any = None
    required: bool = True
    tooltip: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    checked: bool = True

    @property
    def is_widget(self) -> bool:
        """Whether the editor shows a field for it (a link can still replace the field)."""
        return not (isinstance(self.kind, Socket) or self.settings.get("forceInput"))


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One output; `name` is the label in the editor."""

    name: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSchema:
    """Everything that an editor, a validator or a converter must know about a node type.

    `hidden` names values that the executor supplies and no link can, and which ("prompt": "PROMPT");
    `takes_context` says that the function has a keyword-only `context` parameter.
    """

    class_type: str
    category: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    display_name: str | None = None
    description: str = ""
    output_node: bool = False
    hidden: Mapping[str, str] = field(default_factory=dict)
    takes_context: bool = False
    experimental: bool = False
    deprecated: bool = False
    python_module: str = "nodes"  # the editor files "nodes" under the core nodes

    def input(self, name: str) -> InputSpec | None:
        """The input of that name."""
        return next((spec for spec in self.inputs if spec.name == name), None)


class FileLister(Protocol):
    """What files there are: the options of `ModelFile` and `InputImage`."""

    def list(self, folder: str, /) -> Sequence[str]:
        """Names in a model folder, or in "input": pictures; sorted, with "/" between parts."""

    def exists(self, folder: str, name: str, /) -> bool:
        """Whether "input", "output" or "temp" holds this file, subfolders too; False for unsafe names."""

"""A node is a typed function: `@node` reads the schema from the signature.

    @node("ImageScaleToMaxDimension", category="image/upscaling")
    def scale_to_max_dimension(
        image: Image,
        upscale_method: Annotated[str, Choice(("area", "lanczos"))] = "area",
        largest_size: Annotated[int, Int(min=0, max=16384, step=1)] = 512,
    ) -> Image: ...

An annotation carries one of `specs.KINDS`; bare int, float, str and bool stand for Int(), Float(), Text()
and Boolean(). `X | None = None` is an input that may stay unconnected. A keyword-only `context` is no input.
Parameters may be keyword-only where an input without default follows one with a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from usoflow.schema.specs import (
    KINDS,
    Boolean,
    Float,
    InputSpec,
    Int,
    Kind,
    NodeSchema,
    Optional,
    OutputSpec,
    Text,
    Tip,
)

P = ParamSpec("P")
R = TypeVar("R")

CONTEXT = "context"


@dataclass(frozen=True)
class Node(Generic[P, R]):
    """A function with its schema; calling it calls the function.

    Attributes:
        changed: of the inputs that are values and the hidden ones: what tells of outputs kept from an earlier
            run whether they still hold. None for nodes whose outputs follow from their inputs.
        refusal: of the same: what is wrong with them, or None.
        repeatable: whether another node of the type would give the same for the same inputs.
    """

    schema: NodeSchema
    function: Callable[P, R]
    changed: Callable[[Mapping[str, Any]], str] | None = None
    refusal: Callable[[Mapping[str, Any]], str | None] | None = None
    repeatable: bool = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)


AnyNode = Node[..., Any]


class NodeRegistry(Mapping[str, AnyNode]):
    """Node types by name, in the order given. Raises ValueError if two have one name."""

    def __init__(self, nodes: Iterable[AnyNode]) -> None:
        self._nodes: dict[str, AnyNode] = {}
        for entry in nodes:
            if entry.schema.class_type in self._nodes:
                raise ValueError(f"two nodes are called {entry.schema.class_type}")
            self._nodes[entry.schema.class_type] = entry

    @classmethod
    def from_modules(cls, modules: Iterable[ModuleType]) -> NodeRegistry:
        """The nodes defined in these modules, in the order of their definition."""
        return cls(value for module in modules for value in vars(module).values() if isinstance(value, Node))

    def __getitem__(self, class_type: str) -> AnyNode:
        return self._nodes[class_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def schema(self, class_type: str) -> NodeSchema | None:
        """The schema of a node type, if it is known."""
        entry = self._nodes.get(class_type)
        return entry.schema if entry else None


def node(
    class_type: str,
    *,
    category: str,
    display_name: str | None = None,
    output_names: tuple[str, ...] = (),
    output_node: bool = False,
    hidden: tuple[str, ...] = (),
    experimental: bool = False,
    deprecated: bool = False,
) -> Callable[[Callable[P, R]], Node[P, R]]:
    """Make a node type of a function.

    Args:
        output_names: labels of the outputs where they differ from their types.
        output_node: the node is a goal of execution (it saves or shows something); it then has no outputs.
        hidden: names that object_info lists as hidden inputs.

    Raises TypeError at import if an annotation carries no kind.
    """

    def decorate(function: Callable[P, R]) -> Node[P, R]:
        parameters = inspect.signature(function).parameters
        hints = _hints(function, with_return=not output_node)
        schema = NodeSchema(
            class_type=class_type,
            category=category,
            display_name=display_name,
            description=_first_paragraph(function.__doc__),
            inputs=tuple(_input(p, hints[p.name]) for p in parameters.values() if p.name != CONTEXT),
            outputs=() if output_node else _outputs(hints["return"], output_names),
            output_node=output_node,
            hidden={name: name.upper() for name in hidden},
            takes_context=CONTEXT in parameters,
            experimental=experimental,
            deprecated=deprecated,
        )
        return Node(schema, function)

    return decorate


def _hints(function: Callable[..., Any], *, with_return: bool) -> dict[str, Any]:
    """Evaluated annotations of the inputs (and the outputs); the others may name what only mypy imports."""
    skipped = {CONTEXT} if with_return else {CONTEXT, "return"}
    wanted = {name: hint for name, hint in function.__annotations__.items() if name not in skipped}
    stub = SimpleNamespace(__annotations__=wanted)
    return get_type_hints(stub, globalns=inspect.unwrap(function).__globals__, include_extras=True)


def _input(parameter: inspect.Parameter, hint: Any) -> InputSpec:
    hint, nullable = _without_none(hint)
    kind, metadata = _kind(hint, parameter.name)
    tips = [item.text for item in metadata if isinstance(item, Tip)]
    return InputSpec(
        name=parameter.name,
        kind=kind,
        default=None if parameter.default is inspect.Parameter.empty else parameter.default,
        required=not nullable and not any(isinstance(item, Optional) for item in metadata),
        tooltip=tips[0] if tips else "",
    )


def _outputs(hint: Any, names: tuple[str, ...]) -> tuple[OutputSpec, ...]:
    hints = get_args(hint) if get_origin(hint) is tuple else (hint,)
    types = [_kind(item, "return")[0].type for item in hints]
    if names and len(names) != len(types):
        raise TypeError(f"{len(types)} outputs but {len(names)} output names")
    return tuple(OutputSpec(name, type_) for name, type_ in zip(names or types, types, strict=True))


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True)."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    rest = [item for item in get_args(hint) if item is not NoneType]
    if len(rest) != 1:
        raise TypeError(f"an input is one type or None: {hint}")
    return rest[0], True


def _kind(hint: Any, name: str) -> tuple[Kind, tuple[Any, ...]]:
    """The kind in an annotation, and all its metadata."""
    metadata = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    kinds = [item for item in metadata if isinstance(item, KINDS)]
    if kinds:
        return kinds[0], metadata
    bare = get_args(hint)[0] if metadata else hint
    plain: dict[Any, Kind] = {int: Int(), float: Float(), str: Text(), bool: Boolean()}
    if bare not in plain:
        raise TypeError(f"{name}: {hint} does not say what kind of value it is")
    return plain[bare], metadata


def _first_paragraph(doc: str | None) -> str:
    return " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())

"""ComfyUI's custom nodes: a V1 class (`INPUT_TYPES`, `RETURN_TYPES`, `FUNCTION`) becomes a `Node`.

Self-contained classes work unchanged: what they take and give are the ecosystem's own types
(https://docs.comfy.org/custom-nodes/backend/server_overview). `custom_folder.py` finds them in files.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from usoflow.nodes.context import NodeContext, SavedImage, Shown
from usoflow.schema.node import AnyNode, Node
from usoflow.schema.specs import (
    Boolean,
    Choice,
    Float,
    InputSpec,
    Int,
    Kind,
    NodeSchema,
    OutputSpec,
    Socket,
    Text,
)
from usoflow.schema.wire import to_json

logger = logging.getLogger(__name__)

MODULE: Final = "custom_nodes"  # the editor files nodes of such modules under the name that follows
SEEDS: Final = ("seed", "noise_seed")  # to which the editor adds a control widget unasked
HIDDEN: Final = ("PROMPT", "EXTRA_PNGINFO", "UNIQUE_ID")
_ANY_NAME: Final = "usoflow asks for an input of any name"
_OTHER_INPUTS: Final = ("lazy", "rawLink")  # settings: computed only when asked for; the link, not its value


def is_custom(schema: NodeSchema) -> bool:
    """Whether this is not a node of usoflow."""
    return schema.python_module.startswith(f"{MODULE}.")


class UnusableNodeError(Exception):
    """A class that usoflow does not run; the message says why."""


def adapt(name: str, cls: Any, *, module: str, display_name: str | None = None) -> AnyNode:
    """A node of a V1 class.

    Args:
        name: of the node type, a key of NODE_CLASS_MAPPINGS.
        module: of the file it comes from.

    Raises:
        UnusableNodeError: for what is no V1 class, or needs what usoflow does not have.
    """
    try:
        types = cls.INPUT_TYPES()
        schema = _schema(name, cls, types, module, display_name)
        _check(cls, types, schema)
        json.dumps(to_json(schema))  # as the server is told of it
    except (UnusableNodeError, KeyboardInterrupt):
        raise
    except BaseException as error:  # INPUT_TYPES is the node's own code, and may even end the process
        raise UnusableNodeError(f"it cannot be read: {type(error).__name__}: {error}") from error
    validate = getattr(cls, "VALIDATE_INPUTS", None)
    return Node(
        schema,
        V1Function(cls, schema),
        changed=_changed(cls.IS_CHANGED, name) if hasattr(cls, "IS_CHANGED") else None,
        refusal=None if validate is None else _refusal(validate),
        repeatable=not getattr(cls, "NOT_IDEMPOTENT", False),
    )


def hidden_values(
    schema: NodeSchema, node: str, prompt: Mapping[str, Any], workflow: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a node asks for besides its inputs, by the names that it gives them."""
    values = {
        "PROMPT": prompt,
        "EXTRA_PNGINFO": {"workflow": workflow} if workflow else None,
        "UNIQUE_ID": node,
    }
    return {name: values[kind] for name, kind in schema.hidden.items()}


# --- what a class says of itself ---------------------------------------------------------------------------


def _schema(
    name: str, cls: Any, types: Mapping[str, Any], module: str, display_name: str | None
) -> NodeSchema:
    unchecked = _own_checks(cls)
    inputs = [
        _input(key, entry, required=section == "required", checked=not unchecked(key))
        for section in ("required", "optional")
        for key, entry in types.get(section, {}).items()
    ]
    return NodeSchema(
        class_type=name,
        category=getattr(cls, "CATEGORY", "custom"),
        display_name=display_name,
        description=inspect.cleandoc(getattr(cls, "DESCRIPTION", "")),
        inputs=tuple(inputs),
        outputs=_outputs(cls),
        output_node=bool(getattr(cls, "OUTPUT_NODE", False)),
        hidden={key: _type(entry) for key, entry in types.get("hidden", {}).items()},
        takes_context=True,
        experimental=bool(getattr(cls, "EXPERIMENTAL", False)),
        deprecated=bool(getattr(cls, "DEPRECATED", False)),
        python_module=f"{MODULE}.{module}",
    )


def _check(cls: Any, types: Mapping[str, Any], schema: NodeSchema) -> None:
    """Refuse what would run otherwise than its author means."""
    if getattr(cls, "INPUT_IS_LIST", False) or any(getattr(cls, "OUTPUT_IS_LIST", ())):
        raise UnusableNodeError("it takes or gives lists (INPUT_IS_LIST, OUTPUT_IS_LIST)")
    if not callable(getattr(cls, getattr(cls, "FUNCTION", ""), None)):
        raise UnusableNodeError("FUNCTION names no method of it")
    if inspect.iscoroutinefunction(getattr(cls, cls.FUNCTION)):
        raise UnusableNodeError("its FUNCTION is async")
    if "input_types" in _parameters(getattr(cls, "VALIDATE_INPUTS", None)):
        raise UnusableNodeError("VALIDATE_INPUTS asks for input_types")
    sections = [types.get(section, {}) for section in ("required", "optional")]
    if any(_ANY_NAME in section for section in sections):
        raise UnusableNodeError("it takes inputs of any name")
    if any("context" in section for section in sections):
        raise UnusableNodeError("it has an input called context, a name that usoflow keeps for itself")
    unknown = {_type(kind) for kind in types.get("hidden", {}).values()} - set(HIDDEN)
    if unknown:
        raise UnusableNodeError(f"it asks for hidden inputs of the kind {', '.join(sorted(unknown))}")
    other = [spec.name for spec in schema.inputs if any(map(spec.settings.get, _OTHER_INPUTS))]
    if other:
        raise UnusableNodeError(f"it has inputs that are lazy or rawLink: {', '.join(other)}")


def _input(name: str, entry: Any, *, required: bool, checked: bool) -> InputSpec:
    """`("INT", {"default": 1, "min": 0})`, `(["a", "b"],)`, `("IMAGE",)`; a bare type is taken as well."""
    parts = entry if isinstance(entry, list | tuple) else (entry,)
    given, settings = parts[0], dict(parts[1]) if len(parts) > 1 else {}
    kind = _kind(name, given, settings)
    return InputSpec(
        name=name,
        kind=kind,
        default=settings.get("default"),
        required=required,
        tooltip=str(settings.get("tooltip", "")),
        settings=_as_json(settings),
        checked=checked,
    )


def _kind(name: str, given: Any, settings: Mapping[str, Any]) -> Kind:
    control = bool(settings.get("control_after_generate", name in SEEDS and given == "INT"))
    if isinstance(given, list | tuple):
        return Choice(tuple(given), control_after_generate=control)
    low, high, step = (_bound(settings.get(key)) for key in ("min", "max", "step"))
    match str(given):
        case "COMBO":
            return Choice(tuple(settings.get("options", ())), control_after_generate=control)
        case "INT":
            return Int(min=low, max=high, step=step, control_after_generate=control)
        case "FLOAT":
            return Float(min=low, max=high, step=step)
        case "STRING":
            return Text(dynamic_prompts=bool(settings.get("dynamicPrompts", False)))
        case "BOOLEAN":
            return Boolean()
    return Socket(str(given))


def _bound(value: Any) -> Any:
    """A limit, if it is a number: infinity is none, and a text cannot be compared."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _as_json(value: Any) -> Any:
    """As the editor is told of it. JSON has no NaN and no infinity: they become null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def _outputs(cls: Any) -> tuple[OutputSpec, ...]:
    types = [_type(item) for item in cls.RETURN_TYPES]
    names = [str(name) for name in getattr(cls, "RETURN_NAMES", ())]
    return tuple(
        OutputSpec(names[number] if number < len(names) else type_, type_)
        for number, type_ in enumerate(types)
    )


def _type(entry: Any) -> str:
    """A type's name; a list of options is a COMBO."""
    first = entry[0] if isinstance(entry, tuple) and entry else entry
    return "COMBO" if isinstance(first, list) else str(first)


# --- what a class does -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class V1Function:
    """Calls a class's FUNCTION; each node of a workflow keeps its instance from run to run, as in ComfyUI."""

    cls: Any
    schema: NodeSchema

    def __call__(self, *, context: NodeContext, **inputs: Any) -> Any:
        """The outputs as a tuple, or `Shown` with them where there is something to show."""
        key = context.node, self.schema.class_type
        if key not in context.instances:
            context.instances[key] = self.cls()
        method = getattr(context.instances[key], self.cls.FUNCTION)
        given = method(**inputs, **hidden_values(self.schema, context.node, context.prompt, context.workflow))
        if inspect.isawaitable(given):
            raise TypeError("usoflow does not run functions that are async")
        return self._result(given)

    def _result(self, given: Any) -> Any:
        if not isinstance(given, dict):
            return self._complete(given)
        if "expand" in given:
            raise TypeError("usoflow does not run nodes that expand into others")
        outputs = self._complete(given.get("result"))
        return _shown(given["ui"], outputs) if given.get("ui") else outputs

    def _complete(self, given: Any) -> tuple[Any, ...]:
        values = tuple(given) if isinstance(given, list | tuple) else ()
        promised = len(self.schema.outputs)
        if len(values) < promised:
            raise TypeError(f"RETURN_TYPES promises {promised} outputs, the function gave {len(values)}")
        return values


def _shown(ui: Mapping[str, Any], outputs: tuple[Any, ...]) -> Shown:
    """ComfyUI's `ui` record: pictures that are files, and whatever else an extension of the editor shows.

    Images of which more is said than where they are, or that are no files, are shown as the node lists them.
    """
    record = _as_json(ui)
    listed = record.get("images")
    entries = listed if isinstance(listed, list) else []
    images = tuple(saved for image in entries if (saved := SavedImage.of(image)))
    if listed == [asdict(image) for image in images]:
        del record["images"]
    return Shown(images, record, outputs)


def _changed(is_changed: Callable[..., Any], name: str) -> Callable[[Mapping[str, Any]], str]:
    """What IS_CHANGED gives, as a text; a new one each time for NaN, which equals nothing."""

    def changed(values: Mapping[str, Any]) -> str:
        try:
            given = is_changed(**_taken(is_changed, values))
            return repr(given) if given == given else uuid.uuid4().hex
        except (Exception, SystemExit) as error:  # as in ComfyUI: the node then runs
            logger.warning("IS_CHANGED of %s failed: %s: %s", name, type(error).__name__, error)
            return uuid.uuid4().hex

    return changed


def _refusal(validate: Callable[..., Any]) -> Callable[[Mapping[str, Any]], str | None]:
    """What VALIDATE_INPUTS says against the values that it asks for."""

    def refusal(values: Mapping[str, Any]) -> str | None:
        answer = validate(**_taken(validate, values))
        if answer is True:
            return None
        return answer if isinstance(answer, str) else "the node does not take these values"

    return refusal


def _taken(function: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the values that a function takes."""
    wanted = _parameters(function)
    return values if "**" in wanted else {name: values[name] for name in wanted if name in values}


def _own_checks(cls: Any) -> Callable[[str], bool]:
    """Which inputs VALIDATE_INPUTS asks for by name: their range and options are its own affair."""
    wanted = _parameters(getattr(cls, "VALIDATE_INPUTS", None))
    return lambda name: "**" in wanted or name in wanted


def _parameters(function: Any) -> Sequence[str]:
    """Names of the parameters of a bound method, "**" for any others."""
    if function is None:
        return ()
    parameters = inspect.signature(function).parameters.values()
    return ["**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters]

"""Checks one value against one input, with ComfyUI's error types and wording; converts what can be converted.

ComfyUI takes whatever Python's int(), float(), str() and bool() take. Values that these turn into something
nobody meant (the text "false" into True, an object into its source code, NaN) are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from usoflow.schema.object_info import INPUT_FOLDER, options, render_input
from usoflow.schema.specs import (
    ANY_TYPE,
    Boolean,
    Choice,
    FileLister,
    Float,
    InputImage,
    InputSpec,
    Int,
    ModelFile,
    Socket,
    Text,
)

Json = dict[str, Any]
Remedy = Callable[[str, str], str | None]  # model folder and file name -> what to do about its absence

LONGEST_LIST: Final = 20  # longer option lists are only counted in messages
LONGEST_VALUE: Final = 1000
FOLDER_SUFFIXES: Final = {" [input]": INPUT_FOLDER, " [output]": "output", " [temp]": "temp"}


def check_value(
    spec: InputSpec, value: Any, files: FileLister, remedy: Remedy | None
) -> tuple[Any, list[Json]]:
    """The value as the node gets it, and what is wrong with it."""
    value = unwrapped(value)
    match spec.kind:
        case Socket(type=type_):
            return value, [] if type_ == ANY_TYPE else [bad_link(spec, value, files)]
        case Choice() | ModelFile():
            if isinstance(spec.kind, ModelFile) and isinstance(value, str) and "\\" in value:
                offered = options(spec, files) or []
                value = value if value in offered else value.replace("\\", "/")  # of a folder on Windows
            return value, _check_option(spec, value, files, remedy)
        case InputImage():
            return value, _check_image(spec, value, files)
    try:
        converted = _convert(spec, value)
    except (ValueError, TypeError, OverflowError) as reason:
        return value, [_not_convertible(spec, value, reason, files)]
    return converted, _check_range(spec, converted, files) if spec.checked else []


def wrapped(value: Any) -> Any:
    """The value as it stands in a prompt, where a list would read as a link: {"__value__": [...]}."""
    return {"__value__": value} if isinstance(value, list) else value


def unwrapped(value: Any) -> Any:
    """Back from `wrapped`."""
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


def bad_link(spec: InputSpec, value: Any, files: FileLister) -> Json:
    """The input needs a link and got something else, or a link that is none."""
    message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
    return error("bad_linked_input", message, spec.name, **_received(spec, value, files))


def error(type_: str, message: str, details: str, **extra: Any) -> Json:
    """One entry of a node's `errors`."""
    return {"type": type_, "message": message, "details": details, "extra_info": extra}


def _convert(spec: InputSpec, value: Any) -> Any:
    match spec.kind:
        case Int():
            return int(value)
        case Float():
            number = float(value)
            if not math.isfinite(number):
                raise ValueError(f"{number} is not a finite number")
            return number
        case Boolean():
            return _boolean(value)
        case Text():
            return _text(value)
    return value


def _boolean(value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return bool(value)
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("neither true nor false")


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise TypeError(f"a text is needed, not {type(value).__name__}")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is not a character")
    return text


def _not_convertible(spec: InputSpec, value: Any, reason: Exception, files: FileLister) -> Json:
    return error(
        "invalid_input_type",
        f"Failed to convert an input value to a {spec.kind.type} value",
        f"{spec.name}, {_shown(value)}, {_shown(reason)}",
        **_received(spec, value, files),
        exception_message=_shown(reason),
    )


def _check_range(spec: InputSpec, value: Any, files: FileLister) -> list[Json]:
    if not isinstance(spec.kind, Int | Float):
        return []
    unit = float if isinstance(spec.kind, Float) else int
    low, high = spec.kind.min, spec.kind.max
    found = _received(spec, value, files)
    if low is not None and value < low:
        message = f"Value {value} smaller than min of {unit(low)}"
        return [error("value_smaller_than_min", message, spec.name, **found)]
    if high is not None and value > high:
        message = f"Value {value} bigger than max of {unit(high)}"
        return [error("value_bigger_than_max", message, spec.name, **found)]
    return []


def _check_option(spec: InputSpec, value: Any, files: FileLister, remedy: Remedy | None) -> list[Json]:
    if not spec.checked:
        return []
    offered = options(spec, files) or []
    accepted = spec.kind.accepted if isinstance(spec.kind, Choice) else ()
    if value in offered or value in accepted:
        return []
    found = _received(spec, value, files)
    if len(offered) > LONGEST_LIST:
        found["input_config"] = None
    if isinstance(spec.kind, ModelFile) and remedy and isinstance(value, str):
        advice = remedy(spec.kind.folder, value)
        found.update({"remedy": advice} if advice else {})
    details = f"{spec.name}: '{_shown(value)}' not in {_listing(offered)}"
    return [error("value_not_in_list", "Value not in list", details, **found)]


def _check_image(spec: InputSpec, value: Any, files: FileLister) -> list[Json]:
    if isinstance(value, str) and value and files.exists(*image_location(value)):
        return []
    details = f"{spec.name} - Invalid image file: {_shown(value)}"
    return [
        error("custom_validation_failed", "Custom validation failed for node", details, input_name=spec.name)
    ]


def image_location(name: str) -> tuple[str, str]:
    """ "a.png [output]" -> ("output", "a.png"); without such an ending it is in "input"."""
    for suffix, folder in FOLDER_SUFFIXES.items():
        if name.endswith(suffix):
            return folder, name.removesuffix(suffix)
    return INPUT_FOLDER, name


def _received(spec: InputSpec, value: Any, files: FileLister) -> Json:
    return {"input_name": spec.name, "input_config": render_input(spec, files), "received_value": value}


def _listing(offered: Sequence[str]) -> str:
    return str(list(offered)) if len(offered) <= LONGEST_LIST else f"(list of length {len(offered)})"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."

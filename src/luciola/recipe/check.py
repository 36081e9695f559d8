"""Checking a table of settings against its pydantic model, and saying what is wrong in one sentence.

`check` is for every place that takes settings from people: recipes, overrides, the model.config inside a recipe.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

M = TypeVar("M", bound=BaseModel)
Location = tuple[int | str, ...]

LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}

# pydantic's names of type errors, and what a person should write instead
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list in brackets",
    "model_type": "a table of keys",
    "path_type": "a path in quotes",
    "string_type": "a string in quotes",
    "tuple_type": "a list in brackets",
}


class RecipeError(ValueError):
    """What the user wrote in a recipe or an override is wrong; the message is one sentence with the mend."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key that a recipe may have, as the documentation lists it."""

    name: str  # dotted: "grpo.clip_low"
    type: str  # for people: "whole number, at least 1"
    default: object  # None when there is none
    required: bool
    description: str


def check(Model: type[M], data: Mapping[str, Any], where: str | Callable[[Location], str]) -> M:
    """`data` as an instance of `Model`, or a RecipeError whose sentence starts with `where`.

    Types are strict, as TOML has them: "3" is no number, but 3 may stand for 3.0. `where` names the origin of the data,
    such as a file; a function may name it more closely from the location of the faulty key.
    """
    try:
        return validate(Model, data)
    except ValidationError as failure:
        error, location = first_error(failure, data)
        origin = where if isinstance(where, str) else where(location)
        raise RecipeError(f"{origin}: {_sentence(Model, data, error, location)}") from None


def validate(Model: type[M], data: Mapping[str, Any]) -> M:
    """As `check`, but lets pydantic's ValidationError through.

    By way of JSON, because strict JSON takes a list for a tuple, as TOML needs, and strict Python values do not.
    """
    return Model.model_validate_json(json.dumps(data, default=str), strict=True)


def first_error(failure: ValidationError, data: Mapping[str, Any]) -> tuple[ErrorDetails, Location]:
    """The error to show first, and the location of its key in `data`.

    A mistyped key often makes a second error, of the key that is then missing: the unknown key is the one to show.
    """
    error = min(failure.errors(include_url=False), key=lambda error: error["type"] != "extra_forbidden")
    location: list[int | str] = []
    table: Any = data
    for part in error["loc"]:  # also holds what is no key: the tag of a union's branch, such as "arithmetic"
        if part in (table if isinstance(table, dict) else range(len(table)) if isinstance(table, list) else ()):
            table = table[part]
            location.append(part)
    if error["type"] == "missing":
        location.append(error["loc"][-1])
    return error, tuple(location)


def documented_keys(Model: type[BaseModel], data: Mapping[str, Any] | None = None, prefix: str = "") -> Iterator[Key]:
    """Every key that `Model` accepts, sections before their keys, in the order of the source.

    Where a section has several forms (one for each task), all are listed, or, given `data`, those that fit it.
    A key without a description, such as task.name, is a constant that chooses the form, and has the form's.
    """
    for name, field in Model.model_fields.items():
        sections = [Form for Form in _models_in(field.annotation) if data is None or _fits(Form, data.get(name))]
        default = field.get_default(call_default_factory=False)
        limits = [
            f"{LIMITS[kind]} {getattr(limit, kind)}"
            for limit in field.metadata
            for kind in LIMITS
            if hasattr(limit, kind)
        ]
        yield Key(
            name=prefix + name,
            type="section" if sections else ", ".join([_type_name(field.annotation), *limits]),
            default=None if default is PydanticUndefined else default,
            required=field.is_required(),
            description=field.description or f"{_type_name(field.annotation)}: {inspect.getdoc(Model)}".splitlines()[0],
        )
        inner = data.get(name) if data is not None else None
        forms = (documented_keys(F, inner if isinstance(inner, dict) else None, f"{prefix}{name}.") for F in sections)
        merged: dict[str, Key] = {}
        for key in chain.from_iterable(forms):
            known = merged.setdefault(key.name, key)
            if key.type not in known.type:
                both = f"{known.description} {key.description}"
                merged[key.name] = replace(known, type=f"{known.type} or {key.type}", description=both)
        yield from merged.values()


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """The likeliest of `words` for a mistyped `word`; empty if none is near."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)), "")


def _sentence(Model: type[BaseModel], data: Mapping[str, Any], error: ErrorDetails, location: Location) -> str:
    kind, limits = error["type"], error.get("ctx", {})
    name = ".".join(str(part) for part in location)
    shown = _shorten(json.dumps(error["input"], ensure_ascii=False, default=str))
    if kind == "extra_forbidden":
        return f"unknown key {name}{_suggestion(Model, data, location)}"
    if kind == "missing":
        description = next((key.description for key in documented_keys(Model, data) if key.name == name), "")
        return f"{name} is missing" + (f" ({description})" if description else "")
    if kind == "union_tag_not_found":
        return f"{name}.{limits['discriminator'].strip(chr(39))} is missing; it says which form [{name}] has"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in limits["expected_tags"].split(",")]
        near = nearest(limits["tag"], tags)
        mend = f"did you mean '{near}'?" if near else f"there are {', '.join(tags)}"
        return f"{name}.{limits['discriminator'].strip(chr(39))} = '{limits['tag']}' is unknown; {mend}"
    if kind == "value_error":
        message = str(limits["error"])
        if isinstance(error["input"], dict):
            return f"[{name}]: {message}" if name else message
        return f"{name} = {shown} {message}"
    if kind == "literal_error":
        return f"{name} = {shown} must be {limits['expected']}"
    for limit, words in (
        ("ge", "greater_than_equal"),
        ("gt", "greater_than"),
        ("le", "less_than_equal"),
        ("lt", "less_than"),
    ):
        if kind == words:
            return f"{name} = {shown} must be {LIMITS[limit]} {limits[limit]}"
    if kind in EXPECTED:
        return f"{name} = {shown} must be {EXPECTED[kind]}"
    message = error["msg"]
    return f"{name} = {shown}: {message[0].lower()}{message[1:]}"


def _suggestion(Model: type[BaseModel], data: Mapping[str, Any], location: Location) -> str:
    """What to write instead of the unknown key at `location`: a neighbour, a key elsewhere, or all neighbours."""
    *section, leaf = (str(part) for part in location)
    prefix = "".join(f"{part}." for part in section)
    names = [key.name for key in documented_keys(Model, data)]
    neighbours = {name.removeprefix(prefix): name for name in names if name.rpartition(".")[0] == prefix.rstrip(".")}
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(names)}  # the topmost of several namesakes
    near = neighbours.get(nearest(leaf, neighbours, 0.55)) or elsewhere.get(nearest(leaf, elsewhere, 0.8))
    if near:
        return f"; did you mean {near}?"
    here = f"in [{prefix.rstrip('.')}]" if section else "at the top"
    return f"; the keys {here} are {', '.join(neighbours)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return [Model for argument in get_args(annotation) for Model in _models_in(argument)]
    return []


def _fits(Model: type[BaseModel], data: Any) -> bool:
    """Whether `data` agrees with the constants of `Model`, such as the name of a task."""
    constants = {
        name: get_args(f.annotation) for name, f in Model.model_fields.items() if get_origin(f.annotation) is Literal
    }
    return not isinstance(data, dict) or all(data.get(name, values[0]) in values for name, values in constants.items())


def _type_name(annotation: Any) -> str:
    """A type in words: "whole number", "list of string", "'a' or 'b'"."""
    names = {int: "whole number", float: "number", str: "string", bool: "true or false", Path: "path"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f"'{value}'" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not NoneType)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    return "table" if origin is dict else names.get(annotation, str(annotation))


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."

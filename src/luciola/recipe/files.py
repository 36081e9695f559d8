"""Recipe files: finding, reading, overriding and writing them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from luciola.recipe.check import Location, RecipeError, check, first_error, nearest, validate
from luciola.recipe.grpo import GrpoRecipe
from luciola.recipe.pipeline import PipelineRecipe
from luciola.recipe.schema import PretrainRecipe, SftRecipe

M = TypeVar("M", bound=BaseModel)


def load(Model: type[M], name: str | Path, overrides: Sequence[str] = ()) -> M:
    """The recipe of this kind in the file `name` (see `resolve`), with `key.path=value` overrides applied.

    Raises RecipeError, one sentence, for whatever is wrong with the file, its TOML, a key, a value or an override.
    """
    path = resolve(name)
    data = read_toml(path)
    for Other in (PretrainRecipe, SftRecipe, GrpoRecipe, PipelineRecipe):
        if not data.keys() <= Model.model_fields.keys() and data.keys() <= Other.model_fields.keys():
            raise RecipeError(f"{path} is a recipe for `luciola {Other.kind}`; its keys do not fit this command")
    return assemble(Model, data, overrides, str(path))


def assemble(Model: type[M], data: dict[str, Any], overrides: Sequence[str], origin: str) -> M:
    """`data`, which came from `origin`, as a `Model` with overrides applied; RecipeError says where a mistake is.

    An override of objective.name with another objective drops what `data` says about the parts of its own one.
    """
    _drop_other_objectives(data, overrides)
    written: dict[Location, str] = {}  # where each override went, and its text
    for override in overrides:
        written[_apply(data, override)] = override

    def where(location: Location) -> str:
        for key, override in written.items():
            if location[: len(key)] == key:
                return f"override {override}"
        return origin

    return check(Model, _text_where_text_is_due(Model, data, written), where)


def resolve(name: str | Path) -> Path:
    """The file that `name` means: a path, or the name of a shipped recipe ("quickstart", "recipes/quickstart.toml")."""
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_absolute() and path.parent in (Path("."), Path("recipes")):
        candidate = shipped() / path.with_suffix(".toml").name
        if candidate.is_file():
            return candidate
    nearby = [file for file in sorted(path.parent.glob("*.toml")) if file.name != "pyproject.toml"]
    choices = {str(file): file for file in nearby} | {file.stem: file for file in sorted(shipped().glob("*.toml"))}
    near = nearest(str(path), choices)
    mend = f"did you mean {near}?" if near else f"there are {', '.join(choices)}"
    raise RecipeError(f"no recipe {path}; {mend}")


def shipped() -> Path:
    """The folder of the recipes that come with Luciola: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; RecipeError names the file and the line of a mistake."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as mistake:
        message = str(mistake)
        raise RecipeError(f"{path} is not valid TOML: {message[0].lower()}{message[1:]}") from None
    except UnicodeDecodeError as mistake:
        raise RecipeError(f"{path} is not a UTF-8 text file ({mistake.reason} at byte {mistake.start})") from None


def to_toml(recipe: BaseModel) -> str:
    """The recipe with every default written out, as TOML that `load` reads back to an equal recipe.

    TOML has no null: keys that are None are left out, which is why no key has another default than None beside None.
    """
    table: dict[str, Any] = _without_none(recipe.model_dump(mode="json"))
    return tomli_w.dumps(table)


def _apply(data: dict[str, Any], override: str) -> Location:
    """Writes `key.path=value` into `data`, making the sections it passes through; returns the key's location."""
    key, equals, text = override.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not equals or not all(parts):
        raise RecipeError(f"override {override}: expected key.path=value, for example optim.lr=3e-4")
    table = data
    for depth, part in enumerate(parts[:-1], start=1):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override {override}: {'.'.join(parts[:depth])} is a value, not a section")
    table[parts[-1]] = _value(text)
    return parts


def _drop_other_objectives(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Empties each [objective] of `data` that an override gives another name: its parts were chosen for the old one,
    and an override could not take them out."""
    for override in overrides:
        key, _, text = override.partition("=")
        *sections, name = (part.strip() for part in key.split("."))
        if name != "name" or sections[-1:] != ["objective"]:
            continue
        section: Any = data
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get("name", "grpo") != _value(text):
            section.clear()


def _value(text: str) -> Any:
    """The TOML value in `text`; text that is no TOML value stands for itself, so that names need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return parsed["value"] if parsed.keys() == {"value"} else text.strip()


def _text_where_text_is_due(
    Model: type[BaseModel], data: dict[str, Any], written: Mapping[Location, str]
) -> dict[str, Any]:
    """`data` where run.name=7 means "7": an override is read as text once its key turns out to want a string."""
    for _ in written:
        try:
            validate(Model, data)
        except ValidationError as failure:
            error, location = first_error(failure, data)
            if error["type"] in ("string_type", "path_type") and location in written:
                _set(data, location, written[location].partition("=")[2].strip())
    return data


def _set(data: Any, location: Location, value: object) -> None:
    for part in location[:-1]:
        data = data[part]
    data[location[-1]] = value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value

"""Reading a config from a YAML file and `--section.key value` overrides, and writing it back."""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from klear_megatron.config.section import Section
from klear_megatron.errors import UserError, nearest

C = TypeVar("C", bound=Section)

LAUNCH = "launch"
"""The top-level section that only `klear-megatron launch` reads."""


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Reads `path` and applies overrides such as `--policy.optimizer.lr 1e-6` or `--seed=3`.

    A `launch:` section in the file is left to `klear-megatron launch`.

    Raises:
        UserError: no such file, no valid YAML, an unknown key (with the nearest valid one), a
            missing one, or a value that is not allowed; all problems in one message.
    """
    values = read_values(path)
    values.pop(LAUNCH, None)
    values = apply_overrides(values, overrides)
    return validate(cls, values, f"{path} with the command line's values:")


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: no such file, no valid YAML, or no mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such config file; check the path")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}; save it in that encoding") from error
    if values is None:  # an empty file, or only comments
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level must be a mapping of keys to values")
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets what `--section.key value` and `--section.key=value` say, and returns `values`.

    Raises:
        UserError: an override that is none.
    """
    for key, value in _parse_overrides(overrides):
        _set(values, key, value)
    return values


def validate(cls: type[C], values: Mapping[str, Any], title: str) -> C:
    """The section that has these values.

    Raises:
        UserError: as `load_config`; the message begins with `title`.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = [_describe(cls, problem) for problem in error.errors(include_url=False)]
        raise UserError("\n".join([title, *problems])) from error


def write_config(config: Section, path: Path) -> None:
    """Writes every value, defaults included, as YAML that loads back to an equal config."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path.write_text(text, encoding="utf-8")


def _parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"{argument!r}: overrides look like --section.key value")
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{argument}: a value must follow")
            text = rest.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise UserError(f"{argument}: {text!r} is not a YAML value: {error}") from error
    return pairs


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--{dotted}: {section} is a value in the config file, not a section")
    values[key] = value


def _describe(cls: type[Section], problem: Any) -> str:
    keys, section = _walk(cls, problem["loc"])
    location = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"  {location}: unknown key; {nearest(keys[-1], section.model_fields)}"
    if problem["type"] == "missing":
        return f"  {location}: missing; give it a value"
    if problem["type"] == "value_error":  # a section's own check
        return f"  {location + ': ' if location else ''}{problem['ctx']['error']}"
    return f"  {location}: {problem['msg']}; given: {problem['input']!r}"


def _walk(cls: type[BaseModel], location: Sequence[Any]) -> tuple[list[str], type[BaseModel]]:
    """The keys on the way to a problem, as in the file, and the innermost section on that way.

    Args:
        location: pydantic's: keys, the names or numbers of the elements of a field that holds
            several sections, and after a field that is one of several sections, the tag of it.
    """
    section, keys = cls, []
    parts = iter(location)
    for part in parts:
        keys.append(str(part))
        field = section.model_fields.get(part)
        if field is None:  # an unknown key, or a place within a value
            continue
        if field.discriminator is not None:
            section = _tagged(field.annotation, next(parts, None)) or section
        elif inner := _section_in(field.annotation):
            section = inner
            if get_origin(field.annotation) in (dict, list, tuple):
                keys += [str(name) for name in itertools.islice(parts, 1)]
    return keys, section


def _tagged(union: Any, tag: Any) -> type[BaseModel] | None:
    """The member of a tagged union."""
    members = {mark.tag: section for section, mark in map(get_args, get_args(union))}
    return members.get(tag)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class that a field holds: one, an optional one, or several. None for a value."""
    candidates = [annotation, *get_args(annotation)]
    sections = (c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel))
    return next(sections, None)

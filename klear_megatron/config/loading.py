"""A config from a YAML file and `--section.key value` overrides, and writing it back."""

import inspect
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from klear_megatron.config.reading import Key, apply_overrides, parse_overrides, read_with_lines
from klear_megatron.config.section import Section
from klear_megatron.errors import UserError, nearest

C = TypeVar("C", bound=Section)

LAUNCH = "launch"
"""The top-level section that only `klear-megatron launch` reads."""


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Reads `path` and applies overrides such as `--policy.optimizer.lr 1e-6` or `--seed=3`.

    A `launch:` section in the file is left to `klear-megatron launch`.

    Raises:
        UserError: no such file, no valid YAML, an unknown key (with the one of this name elsewhere,
            or the nearest one), a missing one, or a value that is not allowed; all problems in one
            message.
    """
    values, lines = read_with_lines(path)
    values.pop(LAUNCH, None)
    values = apply_overrides(values, overrides)
    overridden = {tuple(key.split(".")) for key, _ in parse_overrides(overrides)}
    lines = {key: line for key, line in lines.items() if not _is_under(key, overridden)}
    return validate(cls, values, f"{path} with the command line's values:", lines)


def _is_under(key: Key, others: Collection[Key]) -> bool:
    return any(key[:length] in others for length in range(1, len(key) + 1))


def validate(
    cls: type[C], values: Mapping[str, Any], title: str, lines: Mapping[Key, int] | None = None
) -> C:
    """The section that has these values.

    Args:
        lines: the line of each key that was read from a file, for the message.

    Raises:
        UserError: as `load_config`; the message begins with `title`.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = [
            _describe(cls, problem, lines or {}) for problem in error.errors(include_url=False)
        ]
        raise UserError("\n".join([title, *_each_list_once(problems)])) from error


def _each_list_once(problems: Iterable[str]) -> Iterator[str]:
    """The problems, without the lists of known keys that an earlier one has."""
    said = set[str]()
    for problem in problems:
        what, _, names = problem.partition("; there are: ")
        yield what if names in said else problem
        said |= {names} if names else set()


def as_yaml(config: Section) -> str:
    """Every value, defaults included, as YAML that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def write_config(config: Section, path: Path) -> None:
    """Writes the config as YAML."""
    path.write_text(as_yaml(config), encoding="utf-8")


def _describe(cls: type[Section], problem: Any, lines: Mapping[Key, int]) -> str:
    keys, section = _walk(cls, problem["loc"])
    line = lines.get(tuple(keys))
    location = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        meant = list(_settings_named(keys[-1], cls))
        unique = f"did you mean {meant[0]}?" if len(meant) == 1 else None
        what = f"{location}: unknown key; {unique or nearest(keys[-1], section.model_fields)}"
    else:
        what = _what_is_wrong(location, problem)
    return (f"  line {line}: " if line else "  ") + what


def _settings_named(name: str, section: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted key of each setting of this name, in the section and those within it."""
    for key, field in section.model_fields.items():
        if key == name:
            yield above + key
        inner = _section_in(field.annotation)
        if inner is not None and get_origin(field.annotation) not in (dict, list, tuple):
            yield from _settings_named(name, inner, f"{above}{key}.")


def _what_is_wrong(location: str, problem: Any) -> str:
    if problem["type"] == "missing":
        return f"{location}: missing; give it a value"
    if problem["type"] == "value_error":  # a section's own check
        return f"{location + ': ' if location else ''}{problem['ctx']['error']}"
    if problem["type"] == "model_type":
        return f"{location}: Input should be a section with its keys; given: {problem['input']!r}"
    return f"{location}: {problem['msg']}; given: {problem['input']!r}"


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

"""Reading a config from a YAML file and `--section.key value` overrides, and writing it back."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from klear_megatron.config.section import Section
from klear_megatron.errors import UserError, nearest

C = TypeVar("C", bound=Section)


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Reads `path` and applies overrides such as `--policy.optimizer.lr 1e-6` or `--seed=3`.

    Raises:
        UserError: no such file, no valid YAML, an unknown key (with the nearest valid one), a
            missing one, or a value that is not allowed; all problems in one message.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such config file; check the path")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}; save it in that encoding") from error
    if values is None:  # an empty file, or one of comments
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level must be a mapping of keys to values")
    for key, value in _parse_overrides(overrides):
        _set(values, key, value)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = [_describe(cls, problem) for problem in error.errors(include_url=False)]
        raise UserError(
            "\n".join([f"{path} with the command line's values:", *problems])
        ) from error


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
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(cls, problem["loc"][:-1])
        return f"  {location}: unknown key; {nearest(str(problem['loc'][-1]), valid)}"
    if problem["type"] == "missing":
        return f"  {location}: missing; give it a value"
    if problem["type"] == "value_error":  # a section's own check
        return f"  {location + ': ' if location else ''}{problem['ctx']['error']}"
    return f"  {location}: {problem['msg']}; given: {problem['input']!r}"


def _valid_keys(cls: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Of the section at `location`, whose parts are keys and, where a key holds several sections,
    the name or number of one of them."""
    section, elements = cls, False
    for part in location:
        if elements:
            elements = False
            continue
        annotation = section.model_fields[part].annotation
        elements = get_origin(annotation) in (dict, list, tuple)
        section = _section_in(annotation)
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section that a field is, may be, or holds several of."""
    candidates = [annotation, *get_args(annotation)]
    return next(c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel))

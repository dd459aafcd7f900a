"""Reading YAML files and `--section.key value` overrides as plain values."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from klear_megatron.errors import UserError

Key = tuple[str, ...]
"""The keys on the way to a value; an element of a list has its number."""


class _Duplicate(yaml.YAMLError):
    """A key that is twice in a mapping, of which YAML would keep the last one."""


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: no such file, no valid YAML, a key that is there twice, or no mapping.
    """
    return read_with_lines(path)[0]


def read_with_lines(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """As `read_values`, with the line of each key."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a YAML file, such as {path / 'config.yaml'}")
    if not path.is_file():
        raise UserError(f"{path}: no such config file; check the path")
    try:
        values, lines = _parse(path.read_text(encoding="utf-8"))
    except _Duplicate as error:
        raise UserError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}; save it in that encoding") from error
    if values is None:  # an empty file, or only comments
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level must be a mapping of keys to values")
    return values, lines


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets what `--section.key value`, `--section.key=value` and `section.key=value` say, and
    returns `values`.

    Raises:
        UserError: an override that is none.
    """
    for key, value in parse_overrides(overrides):
        _set(values, key, value)
    return values


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """The dotted keys and the values of overrides; see `apply_overrides`."""
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals and not argument.startswith("--"):
            raise UserError(f"{argument!r}: overrides look like --section.key value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(
                    f"{argument}: a value must follow; one that begins with -- is written as "
                    f"{argument}=VALUE"
                )
            text = rest.pop(0)
        pairs.append((key, _value(argument, text)))
    return pairs


def _value(argument: str, text: str) -> Any:
    advice = f"a text with signs of YAML needs quotes within those of the shell: '\"{text}\"'"
    try:
        node = yaml.SafeLoader(text).get_single_node()
        value, _ = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{argument}: {text!r} is not a YAML value: {error}; {advice}") from error
    if text[0 if node is None else node.end_mark.index :].strip():
        raise UserError(f"{argument}: {text!r}: YAML takes its # for a comment; {advice}")
    return value


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--{dotted}: {section} is a value in the config file, not a section")
    values[key] = value


def _parse(text: str) -> tuple[Any, dict[Key, int]]:
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None:
        return None, {}
    lines = dict(_lines(node))
    return loader.construct_document(node), lines


def _lines(node: yaml.Node, above: Key = ()) -> Iterator[tuple[Key, int]]:
    """The line of each key in the node, from 1."""
    if isinstance(node, yaml.SequenceNode):
        for number, element in enumerate(node.value):
            yield from _lines(element, (*above, str(number)))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                dotted = ".".join((*above, key))
                raise _Duplicate(f"{dotted} is there twice, in lines {seen[key]} and {line}")
            seen[key] = line
            yield (*above, key), line
            yield from _lines(value_node, (*above, key))

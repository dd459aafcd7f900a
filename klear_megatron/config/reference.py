"""Every setting with its type, default and sentence, as a commented YAML file.

`reference/VERB.yaml` holds what `commented_yaml` makes of the verb's config, so that `--help` can
show it without importing the config, which takes seconds. tools/write_reference.py writes it.
"""

import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from klear_megatron.config.section import Section

FOLDER = Path(__file__).parent / "reference"
_WIDTH = 96
_NAMES = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    type(None): "null",
}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def read_reference(verb: str) -> str:
    """The commented YAML file of a verb."""
    return (FOLDER / f"{verb}.yaml").read_text(encoding="utf-8")


def list_references() -> list[str]:
    """The verbs that have one."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def commented_yaml(cls: type[Section]) -> str:
    """A YAML file with all settings at their defaults, and a comment above each.

    Settings without a default, or with one that depends on the machine, are commented out, and so
    are sections that are left out by default.

    Raises:
        ValueError: a setting has no sentence.
    """
    return "\n".join(_section(cls, None)) + "\n"


def _section(cls: type[Section], defaults: Section | None) -> Iterator[str]:
    for key, field in cls.model_fields.items():
        default = field.default
        if defaults is not None:
            default = getattr(defaults, key)
        elif field.default_factory in (list, dict):
            default = field.default_factory()
        yield from _comment(
            _sentence(cls, key, field), _type(field.annotation, field.metadata), field
        )
        yield from _setting(key, field, default)


def _setting(key: str, field: FieldInfo, default: Any) -> Iterator[str]:
    sections = list(sections_in(field.annotation))
    if not sections:
        required = default is PydanticUndefined
        value = "" if required or _of_machine(default, field) else f" {_yaml(default)}"
        yield f"{key}:{value}" if value else f"# {key}:"
        return
    several = get_origin(field.annotation) in (dict, list, tuple)
    present = not several and default is not None
    own = type(default) if isinstance(default, Section) else sections[0]
    inner = list(_section(own, default if isinstance(default, Section) else None))
    if several:
        inner = (
            ["NAME:", *_indented(inner)] if get_origin(field.annotation) is dict else _item(inner)
        )
    block = [f"{key}:", *_indented(inner)]
    yield from block if present else _commented(block)
    for other in sections:
        if other is not own:
            choice = textwrap.wrap(f"Or {_chosen_by(other)}{_first_sentence(other)}", _WIDTH)
            yield from _indented(_commented([*choice, *_section(other, None)]))


def _chosen_by(cls: type[Section]) -> str:
    """The name that makes a section one of this kind, if there is one."""
    field = cls.model_fields.get("name")
    return "" if field is None or field.is_required() else f"with name: {field.default}. "


def _sentence(cls: type[Section], key: str, field: FieldInfo) -> str:
    """What the setting does: its own sentence, that of the setting it stands for in a parent class,
    or that of the section it holds."""
    if field.description:
        return field.description
    for parent in cls.__mro__[1:]:
        inherited = getattr(parent, "model_fields", {}).get(key)
        if inherited is not None and inherited.description:
            return str(inherited.description)
    for section in sections_in(field.annotation):
        return _first_sentence(section)
    if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
        return _first_sentence(cls)  # the name of a section of this kind
    raise ValueError(f"{cls.__name__}.{key}: has no sentence; write one below it, as a docstring")


def _first_sentence(cls: type[Section]) -> str:
    return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]


def _comment(sentence: str, kind: str, field: FieldInfo) -> list[str]:
    required = ", required" if field.is_required() else ""
    text = " ".join(sentence.split()) + f" ({kind}{required})"
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a setting holds."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def _of_machine(default: Any, field: FieldInfo) -> bool:
    return sys.prefix in str(default) or field.default_factory not in (None, list, dict)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _item(lines: list[str]) -> list[str]:
    return ["-", *_indented(lines)]


def _commented(lines: list[str]) -> list[str]:
    return [line if line.startswith("#") else f"# {line}" for line in lines]


def _type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if any(True for _ in sections_in(annotation)):
        kinds = {dict: "sections by name", tuple: "list of sections", list: "list of sections"}
        optional = " or null" if type(None) in arguments else ""
        return kinds.get(origin, "section") + optional
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin in (list, tuple):
        return "list of " + ", ".join(_type(a) for a in arguments if a is not Ellipsis)
    if origin is dict:
        return f"{_type(arguments[1])} by name"
    limits = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in metadata
        for name, sign in _SIGNS.items()
        if getattr(constraint, name, None) is not None
    ]
    return " ".join([_NAMES.get(annotation, "value"), *limits])

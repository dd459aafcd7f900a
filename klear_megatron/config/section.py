"""The base of every configuration model. Each model stands beside the code it configures."""

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Immutable; unknown keys are errors, and so are booleans in place of numbers and texts. A list
    of one text or section needs no brackets."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_where_they_belong(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take true for 1, and YAML reads `yes` and `on` as true.
        assert info.field_name is not None
        kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
        sections = any(inspect.isclass(kind) and issubclass(kind, BaseModel) for kind in kinds)
        if not sections and not {bool, Any} & kinds and _has_boolean(value):
            raise ValueError(
                "YAML reads yes, no, on, off, true and false as true or false, which is no value "
                "for this key; put it in quotes if it is a text"
            )
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _one_needs_no_brackets(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        several = get_origin(cls.model_fields[info.field_name].annotation) in (list, tuple)
        return [value] if several and isinstance(value, (str, Path, dict)) else value

    @field_validator("*", mode="before")
    @classmethod
    def _paths_are_expanded(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        is_path = Path in _kinds(cls.model_fields[info.field_name].annotation)
        return _expanded(value) if is_path else value


def _expanded(value: Any) -> Any:
    """A path, or several, with `~` and `${VAR}` replaced by what they stand for."""
    if isinstance(value, (list, tuple)):
        return [_expanded(one) for one in value]
    if not isinstance(value, (str, Path)):
        return value
    expanded = os.path.expanduser(os.path.expandvars(value))
    if missing := re.search(r"\$\{(\w+)\}", expanded):
        raise ValueError(f"the environment variable {missing[1]} is not set")
    return expanded


def _kinds(annotation: Any) -> Iterator[Any]:
    """The annotation and everything that it is made of."""
    yield annotation
    for argument in get_args(annotation):
        yield from _kinds(argument)


def _has_boolean(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_boolean, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_boolean, value))
    return isinstance(value, bool)

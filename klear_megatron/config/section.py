"""The base of every configuration model. Each model stands beside the code it configures."""

import inspect
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Immutable; unknown keys are errors, and so are booleans in place of numbers and texts."""

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

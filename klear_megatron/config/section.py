"""The base of every configuration model; each stands beside what it configures."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

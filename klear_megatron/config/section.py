"""The base of every configuration model. Each model stands beside the code it configures."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

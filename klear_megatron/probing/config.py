"""Settings of a probe: `klear-megatron probe`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from klear_megatron.config import Section
from klear_megatron.policy.config import ModelConfig

Depth = Annotated[float, Field(ge=0, le=1)]


class PositionsConfig(Section):
    """Loss and perplexity against the position in the sequence."""

    length: PositiveInt
    """Tokens per sequence."""
    sequences: PositiveInt = 8
    """How many are cut from the text, one after another; fewer if the text ends."""
    windows: PositiveInt = 32
    """Parts of equal size that positions are averaged over."""

    @model_validator(mode="after")
    def _no_window_is_empty(self) -> "PositionsConfig":
        if self.windows >= self.length:
            raise ValueError(f"windows ({self.windows}) must be fewer than length ({self.length})")
        return self


class NeedleConfig(Section):
    """A needle in a haystack: a statement inside a long text, and after it a question about it."""

    statement: str = "\nThe pass key is {value}. Remember it.\n"
    """Text that is hidden in the haystack."""
    question: str = "\nWhat is the pass key? The pass key is"
    """Text at the end, which the answer follows."""
    answer: str = " {value}"
    """What the model must go on with."""
    values: tuple[str, ...] = Field(("71482", "30965", "54817", "28306"), min_length=1)
    """Each sample draws one."""
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)
    """Tokens of a sample, question and answer included."""
    depths: tuple[Depth, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    """Where the statement is: 0 at the start of the text, 1 right before the question."""
    samples: PositiveInt = 8
    """For each length and depth."""


class ProbeConfig(Section):
    """A probe of a model: `klear-megatron probe`."""

    run_dir: Path
    """Gets the results."""
    seed: int = 0
    """Chooses the random samples."""
    policy: ModelConfig
    text: Path
    """A text in UTF-8, as long as the longest sequence at least. It is the haystack, too."""
    positions: PositionsConfig
    needle: NeedleConfig | None = None

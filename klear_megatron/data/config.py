from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from klear_megatron.config import Section


class StageConfig(Section):
    """A part of training with its own mix of data sources."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """data_source -> its share of the prompts, relative to the other shares."""

    prompts: PositiveInt | None = None
    """How many are drawn before the next stage begins; the last stage has no end."""


class ConversationsConfig(Section):
    """Which conversations to fine-tune on."""

    path: Path | tuple[Path, ...]
    """One or several: a .jsonl or .parquet file of `{"messages": [...]}` rows, a folder of such
    files, or the name of a data set on the Hugging Face hub."""

    max_length: PositiveInt = 32768
    """Longest conversation in tokens; longer ones are left out."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """skip counts malformed rows and continues."""


class PromptsConfig(Section):
    """Which prompts to read."""

    path: Path | tuple[Path, ...]
    """One or several: a .jsonl or .parquet file in Klear's or LiveCodeBench's format, a folder of
    such files, or the name of a data set on the Hugging Face hub."""

    max_prompt_length: int = Field(default=4096, ge=1)
    """Longest prompt in tokens, chat template included."""

    too_long: Literal["drop", "cut"] = "drop"
    """cut shortens the longest message of a longer prompt at its start."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """skip counts malformed rows and continues."""


class DataConfig(PromptsConfig):
    """Which prompts to train on, and in which order."""

    stages: tuple[StageConfig, ...] = ()
    """Stages of training, for a curriculum or a mix of data sources. Without stages, each epoch
    shuffles all prompts."""

    @model_validator(mode="after")
    def _only_the_last_stage_is_endless(self) -> "DataConfig":
        for i, stage in enumerate(self.stages):
            if (stage.prompts is None) != (i == len(self.stages) - 1):
                raise ValueError(
                    f"stages.{i}.prompts: every stage but the last has a number of prompts, the "
                    "last has none"
                )
        return self

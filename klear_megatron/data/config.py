import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from klear_megatron.config import Section


class StageConfig(Section):
    """A part of training with its own mix of data sources."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """data_source -> its share of the prompts, relative to the other shares."""

    prompts: PositiveInt | None = None
    """How many are drawn before the next stage begins; the last stage has no end."""


class RowsConfig(Section):
    """Which rows to read."""

    path: Path | tuple[Path, ...]
    """One or several: a .jsonl, .json, .csv or .parquet file, a folder of such files, or the name
    of a data set on the Hugging Face hub."""

    subset: str | None = None
    """The subset (configuration) of a data set on the hub, such as `main` of openai/gsm8k."""

    split: str | None = None
    """The split of a data set on the hub, or of a folder; train by default."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """skip counts malformed rows and continues."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of `path`."""
        return (self.path,) if isinstance(self.path, Path) else self.path


class PromptText(Section):
    """What both prompts and conversations can be put together from."""

    prompt_template: str | None = None
    """The user's message, in which `{column}` stands for the row's value; takes the place of
    `prompt_key`."""


class ConversationColumns(PromptText):
    """Which columns make a conversation. docs/data.md shows rows of every format."""

    messages_key: str = "messages"
    """The column with the messages, also as ShareGPT has them (`from` and `value`). A name with
    dots is a path, here as in every key."""

    tools_key: str = "tools"
    """The column with the tools that the assistant may call; a row need not have it."""

    prompt_key: str | None = None
    """With `response_key`: the column with the user's text, or the messages before the response."""

    response_key: str | None = None
    """The column with the assistant's text, for rows without messages; or with the messages that
    follow the prompt, as TRL's `completion` has them."""

    @model_validator(mode="after")
    def _prompt_and_response_go_together(self) -> "ConversationColumns":
        if self.prompt_key and self.prompt_template:
            raise ValueError("prompt_key and prompt_template: give one of the two")
        if bool(self.prompt_key or self.prompt_template) != bool(self.response_key):
            raise ValueError("prompt_key (or prompt_template) and response_key: give both")
        return self


class PromptColumns(PromptText):
    """Which columns make a prompt to answer. docs/data.md shows rows of every format."""

    prompt_key: str = "prompt"
    """The column with the prompt: messages, or the user's text. A name with dots is a path, here
    as in every key."""

    ground_truth_key: str = "reward_model.ground_truth"
    """The column with the ground truth: a text, a number, or a list of them."""

    ground_truth_pattern: str | None = None
    """A regular expression that finds the answer in the ground truth: its first group, or all that
    it matches. GSM8K's is `#### (.+)`."""

    data_source: str | None = None
    """The data_source of all rows, whatever they say themselves. It chooses the verifier: `math`,
    `code`, or what `rewards.sources` says."""

    @property
    def are_named(self) -> bool:
        """Whether any setting says where the prompt or the ground truth is."""
        settings = PromptColumns.model_fields.keys() - {"data_source"}
        return any(getattr(self, name) != getattr(PromptColumns(), name) for name in settings)

    @field_validator("ground_truth_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class ConversationsConfig(RowsConfig, ConversationColumns):
    """Which conversations to fine-tune on."""

    max_length: PositiveInt = 32768
    """Longest conversation in tokens; longer ones are left out."""


class PromptsConfig(RowsConfig, PromptColumns):
    """Which prompts to read."""

    max_prompt_length: int = Field(default=4096, ge=1)
    """Longest prompt in tokens, chat template included."""

    too_long: Literal["drop", "cut"] = "drop"
    """cut shortens the longest message of a longer prompt at its start."""


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

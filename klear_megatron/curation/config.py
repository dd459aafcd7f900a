"""Settings of `curate`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from klear_megatron.config import Section
from klear_megatron.data.config import PromptColumns, RowsConfig
from klear_megatron.rewards import RewardConfig
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig


class EvaluationSetConfig(RowsConfig, PromptColumns):
    """Problems of an evaluation, read by the same settings as prompts; a path is enough."""

    @model_validator(mode="before")
    @classmethod
    def _a_path_is_enough(cls, given: object) -> object:
        return {"path": given} if isinstance(given, str | Path) else given


class DecontaminationConfig(Section):
    """Drops prompts that have an n-gram of words in common with an evaluation problem."""

    against: tuple[EvaluationSetConfig, ...] = Field(min_length=1)
    """Evaluation sets."""

    n: PositiveInt = 9
    """Words in a row. Of a shorter text all words are one n-gram."""

    boilerplate: PositiveInt = 10
    """An n-gram that more than so many different problems of one evaluation set share is of its
    instructions («You are an expert Python programmer…»), not of a problem, and does not count."""


class TeacherConfig(Section):
    """A model that answers the prompts that pass the other filters."""

    model: Path
    """Hugging Face checkpoint, or the name of one on the hub; with `rollout.urls`, the one that is
    served there."""

    samples_per_prompt: PositiveInt = 16
    """Responses of the teacher per prompt."""
    max_prompt_length: PositiveInt = 4096
    """Longest prompt in tokens, chat template included; longer prompts are dropped."""

    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    seed: int = 0
    """Seed of the servers' sampling."""


class PassRateConfig(Section):
    """Keeps the prompts that a teacher solves neither too rarely nor too often."""

    responses: tuple[Path, ...] = ()
    """The teacher's graded responses, several for each prompt: `responses.jsonl` of `eval`."""

    teacher: TeacherConfig | None = None
    """The teacher to ask now. Its responses are kept in `.teacher/` beside the output; a
    curation that was interrupted resumes from them."""

    above: float = Field(default=0.5, ge=0, lt=1)
    """The share of correct responses has to be greater than this: a majority, as in the paper."""

    at_most: float = Field(default=1.0, gt=0, le=1)
    """The share must not be greater than this; 1 keeps prompts that the teacher always solves."""

    @model_validator(mode="after")
    def _has_one_teacher(self) -> "PassRateConfig":
        if bool(self.responses) == (self.teacher is not None):
            raise ValueError("give either stored responses or a teacher, not both")
        return self


class TopSourcesConfig(Section):
    """Keeps only the rows of the best few sources."""

    count: PositiveInt
    """How many sources to keep."""
    field: str = "data_source"
    """The key of a row that says where it comes from."""

    ranking: tuple[str, ...] = ()
    """Sources, best first, as your experiments say; without any, those with most rows are best."""


class SubsetConfig(Section):
    """Keeps a few prompts that cover all others: K-center-greedy selection."""

    size: PositiveInt
    """How many prompts to keep."""
    embeddings: Path | None = None
    """A .npy file with a vector for each row read, in their order; without it, hashed words and
    pairs of words are the vectors."""

    seed: int = 0
    """Chooses the first prompt."""


class CurateConfig(PromptColumns):
    """Settings of `klear-megatron curate`, which selects prompts and writes them unchanged."""

    path: Path | tuple[Path, ...]
    """One or several data sets, as in `data.path` of a training run."""

    output: Path
    """A .jsonl file. What was dropped is listed in `.dropped.jsonl` beside it, and the numbers are
    in `.report.json`."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """skip counts malformed rows and continues."""
    deduplicate: bool = True
    """Drop prompts that are the same but for white space as one kept before."""

    decontaminate: DecontaminationConfig | None = None
    min_tests: PositiveInt | None = None
    """Fewest tests that a programming problem must have; 16 in the paper."""

    pass_rate: PassRateConfig | None = None
    top_sources: TopSourcesConfig | None = None
    subset: SubsetConfig | None = None

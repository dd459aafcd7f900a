from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from klear_megatron.config import Section
from klear_megatron.data import PromptsConfig
from klear_megatron.rewards import RewardConfig
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig

BenchmarkName = Annotated[str, StringConstraints(pattern=r"^[\w-]+$")]
"""A folder and metrics are named after it."""


class BenchmarkConfig(PromptsConfig):
    """A benchmark's problems, and the number of responses to draw for each."""

    samples_per_problem: PositiveInt = 1
    """Accuracy is their average: avg@n."""


class TrainingEvalConfig(Section):
    """Evaluation of a policy during training, on the rollout servers."""

    every: PositiveInt
    """Steps between evaluations. There is also one before the first step and one after the last."""
    benchmarks: dict[BenchmarkName, BenchmarkConfig] = Field(min_length=1)
    """Benchmarks by a name of your choice."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)


class YarnConfig(Section):
    """An extension of the context length by YaRN."""

    factor: float = Field(gt=1)
    """How many times longer the context becomes."""
    original_length: PositiveInt | None = None
    """Tokens that the model was trained with, which `factor` multiplies; by default its
    max_position_embeddings."""


class EvalConfig(Section):
    """Evaluation of a Hugging Face checkpoint: `klear-megatron eval`."""

    model: Path
    """Hugging Face checkpoint, or the name of one on the hub."""
    chat_template: str | None = None
    """A chat template in place of the tokenizer's: a file, or the Jinja text itself."""
    run_dir: Path
    """Gets results.json, the responses and the server's log; an evaluation that was ended goes on
    from the responses there."""
    benchmarks: dict[BenchmarkName, BenchmarkConfig] = Field(min_length=1)
    """Benchmarks by a name of your choice."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    yarn: YarnConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    seed: int = 0
    """Seed of the servers' sampling."""

    @model_validator(mode="after")
    def _yarn_decides_the_context_length(self) -> "EvalConfig":
        if self.yarn is not None and self.rollout.urls:
            raise ValueError("yarn: takes a server of its own; leave rollout.urls out")
        if self.yarn is not None and self.rollout.context_length is not None:
            raise ValueError("yarn: decides rollout.context_length; leave that out")
        return self

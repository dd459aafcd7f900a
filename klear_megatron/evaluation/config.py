from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from klear_megatron.config import Section
from klear_megatron.data import DataConfig
from klear_megatron.rewards import RewardConfig
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig


class EvalConfig(Section):
    """Evaluation of a Hugging Face checkpoint: `klear-megatron eval`."""

    model: Path
    """Hugging Face checkpoint."""
    run_dir: Path
    """Gets results.json, responses.jsonl and the server's log; an evaluation that was ended goes on
    from the responses there."""
    data: DataConfig
    samples_per_problem: PositiveInt = 1
    """Accuracy is their average: avg@n."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    yarn_factor: float | None = Field(None, gt=1)
    """Extends the model's context length, its max_position_embeddings, to so many times as much."""
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _yarn_decides_the_context_length(self) -> "EvalConfig":
        if self.yarn_factor is not None and self.rollout.urls:
            raise ValueError("yarn_factor: takes a server of its own; leave rollout.urls out")
        if self.yarn_factor is not None and self.rollout.context_length is not None:
            raise ValueError("yarn_factor: decides rollout.context_length; leave that out")
        return self

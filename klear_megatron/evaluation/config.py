from pathlib import Path

from pydantic import PositiveInt

from klear_megatron.config import Section
from klear_megatron.data import DataConfig
from klear_megatron.rewards import RewardConfig
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig


class EvalConfig(Section):
    """Evaluation of a Hugging Face checkpoint: `klear-megatron eval`."""

    model: Path
    """Hugging Face checkpoint."""
    run_dir: Path
    """Gets results.json, responses.jsonl and the server's log."""
    data: DataConfig
    samples_per_problem: PositiveInt = 1
    """Accuracy is their average: avg@n."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    seed: int = 0

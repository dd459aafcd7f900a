"""Settings for reinforcement learning."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from klear_megatron.config import Section
from klear_megatron.data import DataConfig
from klear_megatron.evaluation import TrainingEvalConfig
from klear_megatron.losses import AdvantageConfig, EntropyRatioOptions, GPPOConfig, LossConfig
from klear_megatron.rewards import RewardConfig
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig
from klear_megatron.training.config import RunConfig


class OverlongConfig(Section):
    """Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13): a response loses more of its
    reward the closer it comes to the length limit."""

    buffer: PositiveInt
    """Tokens before `sampling.max_response_length` over which the penalty grows from 0."""
    penalty: float = Field(1.0, gt=0)
    """What a response of `sampling.max_response_length` loses."""


class RLConfig(RunConfig):
    """Reinforcement learning with verifiable rewards: `klear-megatron rl`."""

    data: DataConfig
    save_every: PositiveInt | None = 20
    """Steps between checkpoints; one is always written at the end, and with null only there.
    `policy.checkpoint` says how many are kept."""
    steps: PositiveInt
    """Each step draws responses once and takes several optimizer steps on them."""
    prompts_per_step: PositiveInt = 128
    """Prompts whose responses a step trains on."""
    responses_per_prompt: PositiveInt = 8
    """Responses per prompt: the size of a group, within which rewards are compared."""
    prompts_per_mini_batch: PositiveInt = 16
    """Prompts per optimizer step; fewer than `prompts_per_step` makes training off-policy. If that
    is not divisible by it, the last optimizer step has the rest."""
    max_generation_batches: PositiveInt = 2
    """Groups whose responses all have the same reward are dropped. While fewer than
    `prompts_per_step` are left, another batch of prompts is drawn, up to this many batches. With
    `max_staleness`, each dropped group is replaced by one prompt, up to as many in all."""
    max_staleness: NonNegativeInt = 0
    """How many versions (steps) the weights that drew a group's oldest token may be behind those
    that are trained on it. With 0, a step draws, waits and trains. With more, responses are drawn
    while the trainer trains, up to this many steps ahead; 1 or 2 is usual. GPPO is then steadier
    with `loss.beta_low: 0`; see docs/scale.md."""
    old_log_probs: Literal["trainer", "server"] = "trainer"
    """The old policy of the loss: the trainer before its first update on the responses, which takes
    a forward pass, or the servers' weights at the moment that they drew each token."""
    mask_truncated: bool = False
    """Leave responses that hit the length limit out of the loss; recommended below 32K tokens."""
    token_dumps: NonNegativeInt = 100
    """The newest steps whose responses stay under `rollouts/` token by token, with ids and
    log-probabilities, about 10 bytes a token; `klear-megatron show` prints them. The texts of all
    steps stay. 0 writes none."""
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    overlong: OverlongConfig | None = None
    advantages: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = GPPOConfig()
    evaluation: TrainingEvalConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> "RLConfig":
        if self.prompts_per_mini_batch > self.prompts_per_step:
            raise ValueError(
                f"prompts_per_mini_batch ({self.prompts_per_mini_batch}) is larger than "
                f"prompts_per_step ({self.prompts_per_step}); use at most that"
            )
        if self.responses_per_prompt < 2:
            raise ValueError("responses_per_prompt must be at least 2 to compare responses")
        if self.sampling.top_p < 1 or self.sampling.temperature == 0:
            raise ValueError(
                "sampling: training needs responses from the whole distribution; use top_p 1.0 "
                "and a temperature above 0"
            )
        longest = self.sampling.max_response_length
        if self.overlong is not None and self.overlong.buffer > longest:
            raise ValueError(
                f"overlong.buffer ({self.overlong.buffer}) is more than the longest response: "
                f"sampling.max_response_length ({longest})"
            )
        return self

    @model_validator(mode="after")
    def _check_staleness(self) -> "RLConfig":
        from_servers = self.old_log_probs == "server"
        if self.loss.corrects_mismatch and from_servers:
            raise ValueError(
                "old_log_probs: server leaves nothing to correct, since the old policy is the "
                "servers'; remove loss.tis_clip, loss.token_mask and loss.sequence_mask, or use "
                "old_log_probs: trainer"
            )
        if isinstance(self.loss, EntropyRatioOptions) and self.loss.entropy_ratio and from_servers:
            raise ValueError(
                "old_log_probs: server does not say what the entropies were; remove "
                "loss.entropy_ratio, or use old_log_probs: trainer"
            )
        if self.max_staleness and not (self.loss.corrects_mismatch or from_servers):
            raise ValueError(
                f"max_staleness: {self.max_staleness} trains on tokens of older weights, whose "
                "probabilities must be corrected; set loss.tis_clip (2.0 is usual), a mask of loss "
                "or old_log_probs: server, or leave max_staleness at 0"
            )
        return self

    @property
    def optimizer_steps(self) -> int:
        """The largest possible number; a step whose groups were dropped takes fewer."""
        return self.steps * math.ceil(self.prompts_per_step / self.prompts_per_mini_batch)

    @property
    def own_code(self) -> list[tuple[str, str]]:
        named = [("loss.name", self.loss.name)]
        named += [("rewards.custom", custom.function) for custom in self.rewards.custom]
        named += [("rewards.sources", name) for name in self.rewards.sources.values()]
        return super().own_code + [(key, name) for key, name in named if ":" in name]

    @property
    def method(self) -> str:
        loss = self.loss.name.rpartition("/")[2]  # of one's own, without its folder
        return f"reinforcement learning with verifiable rewards ({loss})"

    @property
    def data_paths(self) -> Sequence[Path]:
        return self.data.paths

    def describe_step(self, data_parallel_size: int) -> list[str]:
        samples = self.prompts_per_mini_batch * self.responses_per_prompt
        updates = math.ceil(self.prompts_per_step / self.prompts_per_mini_batch)
        rest = self.prompts_per_step % self.prompts_per_mini_batch
        last = f"; the last one of {rest} prompts" if rest else ""
        leaders = "1 leader" if data_parallel_size == 1 else f"{data_parallel_size} leaders"
        return [
            f"a step: {self.prompts_per_step} prompts x {self.responses_per_prompt} responses = "
            f"{self.prompts_per_step * self.responses_per_prompt} sequences, drawn by "
            f"{leaders}, {round(self.prompts_per_step / data_parallel_size, 1):g} prompts each",
            f"{updates} optimizer steps on them, each of {self.prompts_per_mini_batch} prompts x "
            f"{self.responses_per_prompt} = {samples} sequences / DP {data_parallel_size} = "
            f"{round(samples / data_parallel_size, 1):g} per data-parallel rank{last}",
        ]

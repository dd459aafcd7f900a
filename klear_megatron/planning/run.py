"""What planning reads of a run's config. The run itself reads all of it; see `sft` and `rl`."""

import math
from typing import Any, Literal

from pydantic import ConfigDict, Field

from klear_megatron.config import Section
from klear_megatron.planning.work import Work
from klear_megatron.policy.config import PolicyConfig

PLAN = "plan.json"
"""A file in `run_dir`: the plan of the newest start, and what its first steps measured."""
READ_ELSEWHERE = frozenset(
    {
        "run_dir",
        "seed",
        "save_every",
        "export_every",
        "start_without_room",
        "epochs",
        "max_generation_batches",
        "mask_truncated",
        "rewards",
        "evaluation",
        "trackers",
    }
)
"""Usual keys of a run's config that planning has no use for. Others are left to the whole config,
which takes seconds to import."""


class _Part(Section):
    """Some fields of a section, with the section's own defaults."""

    model_config = ConfigDict(extra="ignore")


class PlannedData(_Part):
    """Lengths of `data`."""

    max_length: int = 32768
    max_prompt_length: int = 4096


class PlannedSampling(_Part):
    """Lengths of `sampling`."""

    max_response_length: int = 32768


class PlannedRollout(_Part):
    """Servers of `rollout`."""

    urls: list[str] = Field(default_factory=list)
    num_servers: int = 1
    tensor_parallel_size: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    mem_fraction_static: float = 0.8
    max_running_requests: int = 256

    @property
    def servers(self) -> int:
        """How many there are, started or running already."""
        return len(self.urls) or self.num_servers


class PlannedLoss(_Part):
    """What `loss` computes with beside the policy."""

    kl: dict[str, Any] | None = None


class PlannedRun(Section):
    """An SFT config, which has a `batch_size`, or an RL config."""

    model_config = ConfigDict(extra="allow")

    policy: PolicyConfig
    data: PlannedData = PlannedData()
    batch_size: int | None = None
    steps: int | None = None
    prompts_per_step: int = 128
    responses_per_prompt: int = 8
    prompts_per_mini_batch: int = 16
    old_log_probs: Literal["trainer", "server"] = "trainer"
    loss: PlannedLoss = PlannedLoss()
    sampling: PlannedSampling = PlannedSampling()
    rollout: PlannedRollout = PlannedRollout()

    @property
    def needs_judging(self) -> bool:
        """Whether a key is not one that every run has: only the whole config knows it."""
        return bool(set(self.model_extra or {}) - READ_ELSEWHERE)

    @classmethod
    def of(cls, config: Section) -> "PlannedRun":
        """What planning needs of an SFT or RL config that has been read already."""
        return cls.model_validate(config.model_dump())

    @property
    def rl(self) -> bool:
        """Whether it is an RL config."""
        return self.batch_size is None

    @property
    def has_reference(self) -> bool:
        """Whether a KL penalty needs a second model."""
        return self.loss.kl is not None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the run allows."""
        if self.rl:
            return self.data.max_prompt_length + self.sampling.max_response_length
        return self.data.max_length

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one step."""
        return math.ceil(self.prompts_per_step / self.prompts_per_mini_batch) if self.rl else 1

    @property
    def responses(self) -> int:
        """Responses of one step."""
        return self.prompts_per_step * self.responses_per_prompt

    def work(self, positions: int, length: int | None = None, sequences: int | None = None) -> Work:
        """One optimizer step's sequences, all of one length: by default, the longest allowed.

        Args:
            positions: the model's, which bound that default.
        """
        default = self.batch_size or self.prompts_per_mini_batch * self.responses_per_prompt
        return Work((length or min(self.longest, positions),) * (sequences or default))

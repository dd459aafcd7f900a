"""Checks, before any response is drawn, that prompts can be answered and graded."""

from collections.abc import Iterable, Iterator

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from klear_megatron.data import Prompt
from klear_megatron.data.chat_template import opens_thinking
from klear_megatron.errors import UserError
from klear_megatron.rewards import (
    RewardConfig,
    check_data_sources,
    check_functions,
    check_ground_truths,
)
from klear_megatron.rollout import RolloutConfig, SamplingConfig
from klear_megatron.rollout.external_servers import check_lengths


def check_rewards(tokenizer: PreTrainedTokenizerBase, rewards: RewardConfig) -> None:
    """Raises UserError if a function that grades cannot be used, or if every response would count
    as ill-formed, whatever the model writes. Needs no data."""
    check_functions(rewards)
    if rewards.thinking == "required" and opens_thinking(tokenizer):
        raise UserError(
            "rewards.thinking: the chat template writes <think> at the end of a prompt, so no "
            "response would have one of its own; set it to opened"
        )


def check_prompts(
    prompts: Iterable[Prompt],
    longest_prompt: int,
    hf: PretrainedConfig,
    rollout: RolloutConfig,
    sampling: SamplingConfig,
    rewards: RewardConfig,
    section: str = "sampling",
) -> None:
    """Checks that the servers can answer the prompts and that the rewards can grade them.

    Args:
        longest_prompt: tokens.
        section: the name of `sampling` in the config, for the message.

    Raises:
        UserError: the servers' context is too short for prompt and response, a server that should
            already be running does not answer, or a prompt cannot be graded.
    """
    check_lengths(rollout, hf, longest_prompt, sampling, section)
    data_sources = set()

    def graded() -> Iterator[tuple[str, str | list[str]]]:
        for prompt in prompts:
            data_sources.add(prompt.data_source)
            yield prompt.data_source, prompt.ground_truth

    check_ground_truths(graded(), rewards)
    check_data_sources(data_sources, rewards)

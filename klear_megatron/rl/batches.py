"""Groups as tensors, and the mini-batches that a step trains on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from klear_megatron.losses import whitened
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group


def batch_of(groups: Sequence[Group], config: RLConfig) -> Batch:
    """All responses of the groups, each after its prompt.

    The fields are 0 on prompts, and on the tokens of a response:

    - `loss_mask`: 1, or 0 where a truncated response is left out (`mask_truncated`);
    - `correct`: 1 for a response with the full reward. As in the authors' code, that is a right
      answer in a well-formed response: a right answer after broken reasoning is not imitated;
    - `advantages`: the response's;
    - `rollout_log_probs`: the servers'; NaN where theirs was not finite.
    """
    samples = [
        (group.prompt_ids, response, reward, advantage)
        for group in groups
        for response, reward, advantage in zip(
            group.responses, group.rewards, group.advantages, strict=True
        )
    ]
    lengths = [len(prompt) + len(response.token_ids) for prompt, response, _, _ in samples]
    tokens = torch.empty(sum(lengths), dtype=torch.int32)
    log_probs = torch.zeros(sum(lengths))
    for row, values, (prompt, response, _, _) in zip(
        tokens.split(lengths), log_probs.split(lengths), samples, strict=True
    ):
        row.copy_(torch.tensor(prompt + response.token_ids))
        values[len(prompt) :] = torch.tensor(response.log_probs)
    trained = [not (config.mask_truncated and response.truncated) for _, response, _, _ in samples]
    correct = [reward.correct and reward.formatted for _, _, reward, _ in samples]
    return Batch(
        tokens,
        lengths,
        {"rollout_log_probs": log_probs},
        {
            "loss_mask": torch.tensor(trained, dtype=torch.float32),
            "correct": torch.tensor(correct, dtype=torch.float32),
            "advantages": torch.tensor([one[-1] for one in samples], dtype=torch.float32),
        },
        [len(prompt) for prompt, _, _, _ in samples],
    )


def with_whitened_advantages(batch: Batch) -> Batch:
    """The step's batch with its advantages whitened over all responses that are trained."""
    values = batch.per_response
    advantages = whitened(values["advantages"], values["loss_mask"])
    return replace(batch, per_response={**values, "advantages": advantages})


def mini_batches(config: RLConfig, groups: int, step: int) -> Iterator[list[int]]:
    """The sequences of each mini-batch: the step's groups in random order, `prompts_per_mini_batch`
    at a time."""
    size = config.responses_per_prompt
    order = np.random.default_rng([config.seed, step]).permutation(groups)
    for start in range(0, groups, config.prompts_per_mini_batch):
        chosen = order[start : start + config.prompts_per_mini_batch]
        yield [int(group) * size + i for group in chosen for i in range(size)]

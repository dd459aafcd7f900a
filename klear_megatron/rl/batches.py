"""Groups as tensors, and the mini-batches that a step trains on."""

from collections.abc import Iterator, Sequence

import numpy as np

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
    rows: dict[str, list[Sequence[float]]] = {
        name: [] for name in ("tokens", "loss_mask", "correct", "advantages", "rollout_log_probs")
    }
    for group in groups:
        for response, reward, advantage in zip(
            group.responses, group.rewards, group.advantages, strict=True
        ):
            prompt, length = group.prompt_ids, len(response.token_ids)
            trained = not (config.mask_truncated and response.truncated)
            rows["tokens"].append(prompt + response.token_ids)
            for name, values in {
                "loss_mask": [float(trained)] * length,
                "correct": [float(reward.correct and reward.formatted)] * length,
                "advantages": [advantage] * length,
                "rollout_log_probs": response.log_probs,
            }.items():
                rows[name].append([0.0] * len(prompt) + values)
    return Batch.from_sequences(rows.pop("tokens"), **rows)  # type: ignore[arg-type]


def mini_batches(config: RLConfig, batch: Batch, groups: int, step: int) -> Iterator[Batch]:
    """The step's groups in random order, `prompts_per_mini_batch` at a time."""
    size = config.responses_per_prompt
    order = np.random.default_rng([config.seed, step]).permutation(groups)
    for start in range(0, groups, config.prompts_per_mini_batch):
        chosen = order[start : start + config.prompts_per_mini_batch]
        yield batch.select([int(group) * size + i for group in chosen for i in range(size)])

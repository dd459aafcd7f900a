"""The metrics of a step."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from klear_megatron.losses import trained_tokens
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.groups import Group

_COLUMNS = ("score", "correct", "formatted", "timed_out", "tokens", "truncated", "informative")


@dataclass(frozen=True)
class GroupStatistics:
    """Measurements of each response, whether or not it is trained on."""

    table: Tensor
    """[responses, columns] float64."""
    parts: list[dict[str, float]]
    """The parts of each reward, by name."""

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "GroupStatistics":
        graded = [
            (group, response, reward)
            for group in groups
            for response, reward in zip(group.responses, group.rewards, strict=True)
        ]
        rows = [
            (
                reward.score,
                reward.correct,
                reward.formatted,
                reward.timed_out,
                len(response.token_ids),
                response.truncated,
                group.informative,
            )
            for group, response, reward in graded
        ]
        table = torch.tensor(rows, dtype=torch.float64).view(-1, len(_COLUMNS))
        return cls(table, [dict(reward.parts) for _, _, reward in graded])

    @classmethod
    def concatenate(cls, several: Sequence["GroupStatistics"]) -> "GroupStatistics":
        return cls(
            torch.cat([one.table for one in several]),
            list(chain.from_iterable(one.parts for one in several)),
        )

    def metrics(self) -> dict[str, float]:
        """Means and sums over the responses; a reward's part over the responses that have it."""
        column = dict(zip(_COLUMNS, self.table.T, strict=True))
        names = sorted({name for part in self.parts for name in part})
        return {
            "reward/mean": column["score"].mean().item(),
            "reward/accuracy": column["correct"].mean().item(),
            "reward/formatted": column["formatted"].mean().item(),
            "reward/timed_out": column["timed_out"].sum().item(),
            "response/length_mean": column["tokens"].mean().item(),
            "response/length_max": column["tokens"].max().item(),
            "response/truncated": column["truncated"].mean().item(),
            "rollout/dropped_groups": 1 - column["informative"].mean().item(),
            "rollout/tokens": column["tokens"].sum().item(),
            **{
                f"reward/{name}": statistics.mean(part[name] for part in self.parts if name in part)
                for name in names
            },
        }


def log_prob_metrics(batch: Batch) -> dict[str, float]:
    """How far the servers' log-probabilities are from the trainer's on the trained tokens, and how
    many tokens are not trained because the servers' are not finite."""
    trained = trained_tokens(batch.fields) > 0
    left_out = batch.fields["loss_mask"].sum() - trained.sum()
    metrics = {"rollout/log_probs_not_finite": left_out.item()}
    if trained.any():
        ours, servers = batch.fields["old_log_probs"], batch.fields["rollout_log_probs"]
        difference = (ours - servers)[trained].abs()
        metrics["rollout/log_prob_difference_mean"] = difference.mean().item()
        metrics["rollout/log_prob_difference_max"] = difference.max().item()
    return metrics


def train_metrics(mini_batches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the mini-batches; for extremes, the most extreme."""
    metrics = {}
    for name in mini_batches[0]:
        values = [mini_batch[name] for mini_batch in mini_batches]
        if name.endswith("_min"):
            metrics[f"train/{name}"] = min(values)
        elif name.endswith("_max"):
            metrics[f"train/{name}"] = max(values)
        else:
            metrics[f"train/{name}"] = sum(values) / len(values)
    return metrics


def throughput(
    metrics: dict[str, float], seconds: dict[str, float], batch: Batch
) -> dict[str, float]:
    """The seconds, and tokens per second of generation, of training, and of the whole step without
    its evaluation."""
    generated = metrics["rollout/tokens"]
    training = seconds["seconds/total"] - seconds.get("seconds/evaluate", 0.0)
    rates = {"throughput/tokens_per_second": generated / training}
    if "seconds/generate" in seconds:
        rates["throughput/generated_per_second"] = generated / seconds["seconds/generate"]
    if "seconds/train" in seconds:
        rates["throughput/trained_per_second"] = len(batch.tokens) / seconds["seconds/train"]
    return seconds | rates

"""The metrics of a step."""

import collections
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from klear_megatron.losses import LossConfig, Sequences, drawn_tokens, trained_tokens
from klear_megatron.platform import tensors
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.groups import Group


def group_metrics(groups: Sequence[Group], crashes: int) -> dict[str, float]:
    """Collective. Means and sums over the responses of all ranks' groups, trained on or not; a
    reward's part is a mean over the responses that have it.

    Args:
        crashes: of this rank's reward processes.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    responses = [response for group in groups for response in group.responses]
    lengths = [len(response.token_ids) for response in responses]
    parts = collections.defaultdict(list)
    for reward in rewards:
        for name, value in reward.parts.items():
            parts[name].append(value)
    sums = tensors.sums_by_name(
        {
            "responses": len(responses),
            "score": math.fsum(reward.score for reward in rewards),
            "correct": sum(reward.correct for reward in rewards),
            "formatted": sum(reward.formatted for reward in rewards),
            "timed_out": sum(reward.timed_out for reward in rewards),
            "tokens": sum(lengths),
            "truncated": sum(response.truncated for response in responses),
            "informative": sum(len(group.responses) for group in groups if group.informative),
            "crashes": crashes,
            # A name of its own for each rank, so that their sums are the ranks' values.
            f"longest of rank {dist.get_rank()}": max(lengths, default=0),
            **{f"part {name}": math.fsum(values) for name, values in parts.items()},
            **{f"responses with {name}": len(values) for name, values in parts.items()},
        }
    )
    count = sums["responses"]
    part_names = [name.removeprefix("part ") for name in sums if name.startswith("part ")]
    return {
        "reward/mean": sums["score"] / count,
        "reward/accuracy": sums["correct"] / count,
        "reward/formatted": sums["formatted"] / count,
        "reward/timed_out": sums["timed_out"],
        "reward/crashes": sums["crashes"],
        "response/length_mean": sums["tokens"] / count,
        "response/length_max": max(sums[name] for name in sums if name.startswith("longest of ")),
        "response/truncated": sums["truncated"] / count,
        "rollout/dropped_groups": 1 - sums["informative"] / count,
        "rollout/tokens": sums["tokens"],
        **{
            f"reward/{name}": sums[f"part {name}"] / sums[f"responses with {name}"]
            for name in part_names
        },
    }


def staleness_metrics(
    groups: Sequence[Group], version: int, carried_over: int, idle_s: float
) -> dict[str, float]:
    """Collective. How far the weights that drew the groups are behind those trained on them.

    Args:
        groups: this rank's, to train on.
        version: of the weights that are trained.
        carried_over: this rank's prompts that are not finished and go on beside the step.
        idle_s: seconds without a request of this rank's in flight; 0 if it has none.
    """
    staleness = [
        version - min(int(response.versions[0]) for response in group.responses) for group in groups
    ]
    spans = [len(response.versions) for group in groups for response in group.responses]
    rank = dist.get_rank()
    sums = tensors.sums_by_name(
        {
            "groups": len(groups),
            "staleness": sum(staleness),
            "responses": len(spans),
            "spans": sum(spans),
            "carried_over": carried_over,
            f"stalest of rank {rank}": max(staleness, default=0),
            f"idle of rank {rank}": idle_s,
        }
    )
    return {
        "rollout/staleness_mean": sums["staleness"] / max(sums["groups"], 1),
        "rollout/staleness_max": max(v for name, v in sums.items() if name.startswith("stalest ")),
        "rollout/versions_per_response": sums["spans"] / max(sums["responses"], 1),
        "rollout/carried_over": sums["carried_over"],
        "seconds/servers_idle": max(v for name, v in sums.items() if name.startswith("idle ")),
    }


def log_prob_metrics(batch: Batch, loss: LossConfig) -> dict[str, float]:
    """How far the servers' log-probabilities are from the trainer's, how many tokens are not
    trained because the servers' are not finite, and which share of the others, and of responses
    with any, the masks of `loss` leave out."""
    fields = batch.fields
    drawn = drawn_tokens(fields)
    left_out = fields["loss_mask"].sum() - drawn.sum()
    metrics = {"rollout/log_probs_not_finite": left_out.item()}
    if drawn.any():
        difference = (fields["old_log_probs"] - fields["rollout_log_probs"])[drawn > 0].abs()
        metrics["rollout/log_prob_difference_mean"] = difference.mean().item()
        metrics["rollout/log_prob_difference_max"] = difference.max().item()
    if loss.token_mask is not None or loss.sequence_mask is not None:
        sequences = Sequences.whole(batch.lengths)
        trained = trained_tokens(fields, sequences, loss)
        for name, before, after in (
            ("tokens", drawn, trained),
            ("sequences", sequences.sums(drawn) > 0, sequences.sums(trained) > 0),
        ):
            share = 1 - after.sum() / before.sum().clamp(min=1) if before.any() else torch.zeros(())
            metrics[f"rollout/masked_{name}"] = share.item()
    return metrics


def train_metrics(mini_batches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the mini-batches; for extremes, the most extreme. The gradient norm gets both: a
    mean hides the one mini-batch that went wrong."""
    metrics = {"train/grad_norm_max": max(one["grad_norm"] for one in mini_batches)}
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
    """The seconds, those in which the trainer and the servers had nothing to do, and tokens per
    second of generation, of training, and of the whole step without its evaluation."""
    generated = metrics["rollout/tokens"]
    training = seconds["seconds/total"] - seconds.get("seconds/evaluate", 0.0)
    generating = seconds.get("seconds/generate", 0.0)
    waiting = generating + seconds.get("seconds/reward", 0.0) + seconds.get("seconds/wait", 0.0)
    seconds["seconds/trainer_idle"] = waiting
    if "seconds/servers_idle" not in metrics:
        seconds["seconds/servers_idle"] = training - generating
    rates = {"throughput/tokens_per_second": generated / training}
    if "seconds/generate" in seconds:
        rates["throughput/generated_per_second"] = generated / seconds["seconds/generate"]
    if "seconds/train" in seconds:
        rates["throughput/trained_per_second"] = len(batch.tokens) / seconds["seconds/train"]
    return seconds | rates

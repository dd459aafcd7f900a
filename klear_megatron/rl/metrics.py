"""The metrics of a step."""

import collections
import math
from collections.abc import Mapping, Sequence
from itertools import compress

import torch
import torch.distributed as dist

from klear_megatron.losses import LossConfig, Sequences, drawn_tokens, trained_tokens
from klear_megatron.observability import Metric
from klear_megatron.platform import tensors
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.groups import Group

METRICS = (
    Metric(
        "reward/mean",
        "reward",
        "score, mean over the responses",
        "falls, or does not rise for hundreds of steps",
    ),
    Metric("reward/accuracy", "share", "responses whose answer is right, whatever the format"),
    Metric(
        "reward/formatted",
        "share",
        "responses whose reasoning is in one well-formed think block",
        "below 0.9 after SFT, or falls",
    ),
    Metric(
        "reward/timed_out",
        "share",
        "responses whose verification reached a time limit; they count as wrong",
        "above 0.01: right answers may be among them",
    ),
    Metric(
        "reward/crashes",
        "count",
        "processes that died while they graded, in this step; their responses count as wrong",
        "not 0",
    ),
    Metric(
        "reward/PART", "", "a part of the reward, by its name, mean over the responses that have it"
    ),
    Metric("response/length_mean", "tokens", "mean over the responses", "jumps, or shrinks to few"),
    Metric("response/length_max", "tokens", "the longest response"),
    Metric("response/length_right", "tokens", "mean over the responses with a right answer"),
    Metric(
        "response/length_wrong",
        "tokens",
        "mean over the responses with a wrong answer",
        "grows away from `length_right`: the policy rambles where it is lost",
    ),
    Metric(
        "response/truncated",
        "share",
        "responses that reached the length limit",
        "above 0.1, or rises: the limit is too short, or the policy does not end",
    ),
    Metric("groups/drawn", "count", "groups made for the step, trained on or not"),
    Metric(
        "groups/trained",
        "count",
        "groups trained on, `prompts_per_step` at most",
        "below `prompts_per_step`: the step trains on less than was asked for",
    ),
    Metric(
        "groups/dropped",
        "count",
        "groups that teach nothing, because no response is better than another",
        "more than half of `groups/drawn`: choose prompts of another difficulty",
    ),
    Metric("groups/all_right", "count", "groups in which every answer is right", "most: too easy"),
    Metric("groups/all_wrong", "count", "groups in which no answer is right", "most: too hard"),
    Metric("rollout/tokens", "tokens", "all responses of the step together"),
    Metric(
        "rollout/requests_per_server_mean",
        "prompts",
        "prompts answered since the last step took its groups, evaluations included, mean over the "
        "servers",
    ),
    Metric(
        "rollout/requests_per_server_min",
        "prompts",
        "the same, of the server with the fewest",
        "0, or far below the mean: that server is lost, or slow",
    ),
    Metric("rollout/requests_per_server_max", "prompts", "the same, of the server with the most"),
    Metric(
        "rollout/log_probs_not_finite",
        "tokens",
        "response tokens that are not trained, because the server's log-probability is not finite",
        "not 0 for long: the server computes NaN",
    ),
    Metric(
        "rollout/log_prob_difference_mean",
        "nats",
        "trainer's and server's log-probability of a token, absolute difference, mean over tokens",
        "above 0.02 with bfloat16, or rises; above 0.001 with float32",
    ),
    Metric("rollout/log_prob_difference_max", "nats", "the same, of the token with the largest"),
    Metric(
        "rollout/kl_to_reference",
        "nats",
        "with `loss.kl`: from the old policy to the reference, by its estimator, mean over tokens",
    ),
    Metric(
        "rollout/masked_tokens",
        "share",
        "tokens that the masks of `loss` leave out",
        "above 0.05: training sees another distribution than was drawn",
    ),
    Metric(
        "rollout/masked_sequences",
        "share",
        "responses of which the masks of `loss` leave out every token",
        "above 0.1",
    ),
    Metric(
        "rollout/staleness_mean",
        "versions",
        "with `max_staleness`: from the weights that drew a group's oldest token to those trained, "
        "mean over the trained groups",
    ),
    Metric("rollout/staleness_max", "versions", "the same, of the oldest group"),
    Metric(
        "rollout/versions_per_response",
        "versions",
        "weights that drew one response, mean over the trained responses",
    ),
    Metric("rollout/carried_over", "prompts", "prompts that are drawn on beside the step"),
    Metric("seconds/generate", "s", "drawing responses while the trainer waits"),
    Metric("seconds/wait", "s", "with `max_staleness`: waiting for the step's groups"),
    Metric("seconds/reward", "s", "waiting for grades after the last response"),
    Metric("seconds/share", "s", "giving the groups to all ranks, and writing dumps"),
    Metric("seconds/log_probs", "s", "the trainer's log-probabilities before the first update"),
    Metric("seconds/reference", "s", "with `loss.kl`: the reference's log-probabilities"),
    Metric("seconds/sync", "s", "pushing weights to the servers", "a large part of the step"),
    Metric("seconds/evaluate", "s", "the evaluation after the step"),
    Metric(
        "seconds/trainer_idle",
        "s",
        "waiting for responses and grades",
        "most of the step: more servers, or `max_staleness`",
    ),
    Metric(
        "seconds/servers_idle",
        "s",
        "no request in flight, at the leader for which this was longest",
        "most of the step: fewer servers, or `max_staleness`",
    ),
    Metric(
        "flops/log_probs",
        "FLOPs",
        "of the forward passes for `seconds/log_probs` and `seconds/reference`",
    ),
    Metric(
        "flops/generate",
        "FLOPs",
        "of one forward pass over all sequences that were drawn for the step, prompts included; "
        "what servers keep of a prompt or compute again is not considered",
    ),
    Metric(
        "throughput/generated_per_second",
        "tokens/s",
        "`rollout/tokens` over `seconds/generate`, all servers together",
    ),
)

TRAIN_METRICS = (
    Metric(
        "grad_norm_max",
        "norm",
        "in RL: the largest of the step's optimizer steps, before clipping",
        "ten times `grad_norm`: look at that step's responses with `show`",
    ),
)
"""Of `train_metrics`, beside what the learner and the objective have."""


def group_metrics(groups: Sequence[Group], crashes: int) -> dict[str, float]:
    """Collective. Means and sums over the responses of all ranks' groups, trained on or not; a
    reward's part is a mean over the responses that have it.

    Args:
        crashes: of this rank's reward processes, in this step.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    responses = [response for group in groups for response in group.responses]
    lengths = [len(response.token_ids) for response in responses]
    right = [reward.correct for reward in rewards]
    correct = [[reward.correct for reward in group.rewards] for group in groups]
    parts = collections.defaultdict(list)
    for reward in rewards:
        for name, value in reward.parts.items():
            parts[name].append(value)
    sums = tensors.sums_by_name(
        {
            "responses": len(responses),
            "score": math.fsum(reward.score for reward in rewards),
            "right": sum(right),
            "formatted": sum(reward.formatted for reward in rewards),
            "timed_out": sum(reward.timed_out for reward in rewards),
            "tokens": sum(lengths),
            "right tokens": sum(compress(lengths, right)),
            "truncated": sum(response.truncated for response in responses),
            "groups": len(groups),
            "dropped": sum(not group.informative for group in groups),
            "all right": sum(map(all, correct)),
            "all wrong": sum(not any(of_one) for of_one in correct),
            "crashes": crashes,
            # A name of its own for each rank, so that their sums are the ranks' values.
            f"longest of rank {dist.get_rank()}": max(lengths, default=0),
            **{f"part {name}": math.fsum(values) for name, values in parts.items()},
            **{f"responses with {name}": len(values) for name, values in parts.items()},
        }
    )
    count, right_count = sums["responses"], sums["right"]
    part_names = [name.removeprefix("part ") for name in sums if name.startswith("part ")]
    return {
        "reward/mean": sums["score"] / count,
        "reward/accuracy": right_count / count,
        "reward/formatted": sums["formatted"] / count,
        "reward/timed_out": sums["timed_out"] / count,
        "reward/crashes": sums["crashes"],
        "response/length_mean": sums["tokens"] / count,
        "response/length_max": max(sums[name] for name in sums if name.startswith("longest of ")),
        "response/truncated": sums["truncated"] / count,
        "groups/drawn": sums["groups"],
        "groups/dropped": sums["dropped"],
        "groups/all_right": sums["all right"],
        "groups/all_wrong": sums["all wrong"],
        "rollout/tokens": sums["tokens"],
        **_lengths("right", sums["right tokens"], right_count),
        **_lengths("wrong", sums["tokens"] - sums["right tokens"], count - right_count),
        **{
            f"reward/{name}": sums[f"part {name}"] / sums[f"responses with {name}"]
            for name in part_names
        },
    }


def _lengths(kind: str, tokens: float, responses: float) -> dict[str, float]:
    return {f"response/length_{kind}": tokens / responses} if responses else {}


def request_metrics(answered: Mapping[str, int]) -> dict[str, float]:
    """Collective. How evenly the prompts were given to the servers.

    Args:
        answered: server -> this rank's prompts that it has answered; empty if it does not lead.
    """
    by_server = tensors.sums_by_name(answered).values()
    return {
        "rollout/requests_per_server_mean": sum(by_server) / len(by_server),
        "rollout/requests_per_server_min": min(by_server),
        "rollout/requests_per_server_max": max(by_server),
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
    """Means over the mini-batches on which a step was taken; for extremes, the most extreme. The
    gradient norm gets both: a mean hides the one mini-batch that went wrong."""
    taken = [one for one in mini_batches if math.isfinite(one["grad_norm"])]
    metrics = {"train/skipped": float(len(mini_batches) - len(taken))}
    if not taken:
        return metrics
    metrics["train/grad_norm_max"] = max(one["grad_norm"] for one in taken)
    for name in taken[0]:
        values = [mini_batch[name] for mini_batch in taken]
        if name.endswith("_min"):
            metrics[f"train/{name}"] = min(values)
        elif name.endswith("_max"):
            metrics[f"train/{name}"] = max(values)
        else:
            metrics[f"train/{name}"] = sum(values) / len(values)
    return metrics


def idle_times(metrics: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """The seconds in which the trainer and the servers had nothing to do, and how fast the servers
    were meanwhile."""
    training = seconds["seconds/total"] - seconds.get("seconds/evaluate", 0.0)
    generating = seconds.get("seconds/generate", 0.0)
    waiting = generating + seconds.get("seconds/reward", 0.0) + seconds.get("seconds/wait", 0.0)
    found = {"seconds/trainer_idle": waiting}
    if "seconds/servers_idle" not in metrics:
        found["seconds/servers_idle"] = training - generating
    if generating:
        found["throughput/generated_per_second"] = metrics["rollout/tokens"] / generating
    return found

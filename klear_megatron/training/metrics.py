"""The metrics that every training run has."""

import resource
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from klear_megatron.data import PromptSampler
from klear_megatron.observability.metric import Metric
from klear_megatron.platform import objects
from klear_megatron.policy.learner import Learner
from klear_megatron.training.planned import PlannedSteps

METRICS = (
    Metric(
        "progress/epoch",
        "epochs",
        "rows handed out so far over the rows of the data",
        "in RL, far above 1: the policy sees the same problems again and again",
    ),
    Metric(
        "progress/optimizer_steps",
        "steps",
        "optimizer steps taken since the run began, which the learning rate follows",
        "stops growing: gradients are not finite, or no group teaches anything",
    ),
    Metric(
        "memory/peak_gib",
        "GiB",
        "the most memory that any rank has held since it started: a GPU's tensors, or without a "
        "GPU the process",
        "grows from step to step, or comes near the device's memory",
    ),
    Metric(
        "train/skipped",
        "count",
        "optimizer steps that were not taken, because a gradient was not finite; in RL, they count "
        "in no other metric of the training",
        "not 0: `not_finite/` has the mini-batches",
    ),
    Metric(
        "val/loss",
        "nats",
        "negative log-likelihood of the held-out conversations, mean over their trained tokens",
        "rises while `train/loss` falls: the model learns the conversations by heart",
    ),
    Metric("seconds/total", "s", "the whole step, but not the checkpoint after it"),
    Metric("seconds/train", "s", "all optimizer steps of the step"),
    Metric(
        "seconds/save",
        "s",
        "after `seconds/total`: writing the checkpoints that are due; with `asynchronous`, only "
        "what the trainer waits for them",
        "a large part of the run: save less often, or asynchronously",
    ),
    Metric(
        "throughput/trained_per_second",
        "tokens/s",
        "tokens of the trained sequences, prompts included, over `seconds/train`",
    ),
    Metric(
        "throughput/tokens_per_second_per_gpu",
        "tokens/s",
        "tokens of the trained sequences, prompts included, over the whole step without its "
        "evaluation, for each rank of the trainer",
        "falls while lengths stay: see which of `seconds/` grew",
    ),
    Metric(
        "flops/train",
        "FLOPs",
        "of the optimizer steps: forward and backward, as `plan` counts model FLOPs, without what "
        "is computed again",
    ),
    Metric(
        "throughput/mfu",
        "share",
        "`flops/train` over `seconds/train` and over what all ranks could do; missing where the "
        "hardware is not known",
        "far below what `plan` says",
    ),
)


def run_metrics(learner: Learner, sampler: PromptSampler) -> dict[str, float]:
    """Collective. How far the run is, and the memory that it took."""
    return {
        "progress/epoch": sampler.epoch,
        "progress/optimizer_steps": learner.optimizer_steps,
        "memory/peak_gib": max(objects.all_gather(peak_memory())) / 2**30,
    }


def training_speed(
    planned: PlannedSteps, lengths: Sequence[int], seconds: Mapping[str, float]
) -> dict[str, float]:
    """How fast sequences of these lengths were trained, and the work that it was.

    Args:
        seconds: from `Phases.take`, of a step that has trained.
    """
    tokens, training = sum(lengths), seconds["seconds/train"]
    step = seconds["seconds/total"] - seconds.get("seconds/evaluate", 0.0)
    speed = {
        "flops/train": planned.flops(lengths),
        "throughput/trained_per_second": tokens / training,
        "throughput/tokens_per_second_per_gpu": tokens / step / dist.get_world_size(),
    }
    if (mfu := planned.mfu(lengths, training)) is not None:
        speed["throughput/mfu"] = mfu
    return speed


def peak_memory() -> int:
    """The most bytes that this rank has used: the GPU's memory, or the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

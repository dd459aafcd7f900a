"""Every rank gets the leaders' sequences, to the last bit, and the same metrics."""

import math
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from klear_megatron.data import Prompt
from klear_megatron.platform import tensors
from klear_megatron.policy.batch import Batch
from klear_megatron.rewards import Reward
from klear_megatron.rl.batches import batch_of
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group
from klear_megatron.rl.metrics import group_metrics
from klear_megatron.rl.sharing import share
from klear_megatron.rollout import Response
from tests.distributed.ranks import run_ranks
from tests.rl.test_groups import config_of

LEADERS = [0, 2]
ODD_NAN = struct.unpack("<f", struct.pack("<I", 0x7FC12345))[0]


def group(prompt: list[int], answers: list[list[int]], scores: list[float]) -> Group:
    rewards = [
        Reward(score, correct=score > 0, formatted=True, parts={"length": score / 2})
        for score in scores
    ]
    responses = [
        Response(ids, [-0.0 if token % 2 else ODD_NAN for token in ids], "stop", "0")
        for ids in answers
    ]
    advantages = [-0.0, 0.1] if scores[0] != scores[1] else [0.0, 0.0]
    return Group(Prompt("", [], "", 0), prompt, responses, ["", ""], rewards, advantages)


GROUPS = {
    0: [group([1, 2], [[3], [4, 5, 6]], [1.0, -1.0]), group([7], [[8], [9]], [1.0, 1.0])],
    1: [],
    2: [group([10, 11, 12], [[13, 200_000], [14]], [0.1, 0.2])] * 2,
}


def on_one_rank(config: RLConfig, limit: int) -> Batch:
    """What all ranks should have, made without any exchange."""
    return batch_of([g for leader in LEADERS for g in GROUPS[leader]][:limit], config)


def shared_by_three(config: RLConfig) -> list[tuple[bytes, list[int], list[int]]]:
    mine = batch_of(GROUPS[dist.get_rank()], config)
    return [contents(share(mine, LEADERS, limit * 2)[0]) for limit in (1, 3, 100)]


def contents(batch: Batch) -> tuple[bytes, list[int], list[int]]:
    names = ("loss_mask", "correct", "advantages", "rollout_log_probs")
    values = [batch.tokens, *(batch.fields[name] for name in names)]
    assert [one.dtype for one in values] == [torch.int32] + [torch.float32] * 4
    data = b"".join(one.view(torch.uint8).numpy().tobytes() for one in values)
    return data, batch.lengths, batch.prompt_lengths


def test_every_rank_gets_the_same_bits_in_the_order_of_the_leaders():
    config = config_of(Path())
    wanted = [contents(on_one_rank(config, limit)) for limit in (1, 3, 100)]
    assert struct.pack("<f", ODD_NAN) in wanted[0][0]
    assert run_ranks(3, shared_by_three, config) == [wanted] * 3


def metrics_of_three() -> dict[str, float]:
    return group_metrics(GROUPS[dist.get_rank()], crashes=dist.get_rank())


def test_metrics_are_those_of_all_responses():
    metrics, *others = run_ranks(3, metrics_of_three)
    assert others == [metrics] * 2
    scores = [1.0, -1.0, 1.0, 1.0, 0.1, 0.2, 0.1, 0.2]
    lengths = [1, 3, 1, 1, 2, 1, 2, 1]
    assert metrics == pytest.approx(
        {
            "reward/mean": sum(scores) / 8,
            "reward/accuracy": 7 / 8,
            "reward/formatted": 1.0,
            "reward/timed_out": 0,
            "reward/crashes": 3,
            "reward/length": sum(scores) / 16,
            "response/length_mean": sum(lengths) / 8,
            "response/length_max": 3,
            "response/truncated": 0,
            "response/length_right": 9 / 7,
            "response/length_wrong": 3,
            "groups/drawn": 4,
            "groups/dropped": 1,
            "groups/all_right": 3,
            "groups/all_wrong": 0,
            "rollout/tokens": sum(lengths),
        }
    )


def sums_of_three() -> dict[str, float]:
    rank = dist.get_rank()
    return tensors.sums_by_name({"all": 0.5 + rank, f"only {rank}": float(rank)})


def test_a_name_may_be_missing_on_some_ranks():
    wanted = {"all": 4.5, "only 0": 0.0, "only 1": 1.0, "only 2": 2.0}
    assert run_ranks(3, sums_of_three) == [wanted] * 3


def test_a_batch_without_groups_has_the_same_fields():
    nothing = batch_of([], config_of(Path()))
    something = batch_of(GROUPS[0], config_of(Path()))
    assert list(nothing.fields) == list(something.fields)
    assert len(nothing.tokens) == 0
    assert math.isnan(something.fields["rollout_log_probs"][5])

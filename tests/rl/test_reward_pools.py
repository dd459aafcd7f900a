import os
import socket

import torch.distributed

from klear_megatron.rewards import RewardConfig
from klear_megatron.rl.loop import make_reward_pool
from tests.distributed.ranks import run_ranks
from tests.rewards.test_pool import job, workers_of


def graders_of(hosts: list[str], leaders: list[int], workers: int) -> int:
    """How many processes grade for this rank."""
    rank = torch.distributed.get_rank()
    socket.gethostname = lambda: hosts[rank]
    pool = make_reward_pool(RewardConfig(workers=workers), leads=rank in leaders)
    if pool is None:
        return 0
    with pool:
        pool.grade([job("")] * 2 * workers)
        return len(workers_of(os.getpid()))


def test_leaders_of_a_host_share_its_cores():
    assert run_ranks(3, graders_of, ["a", "a", "b"], [0, 1, 2], 4) == [2, 2, 4]


def test_ranks_that_do_not_lead_take_no_share():
    assert run_ranks(2, graders_of, ["a", "a"], [0], 2) == [2, 0]

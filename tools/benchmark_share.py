"""Measures how long the ranks of a step take to share its sequences, and what that costs.

Every rank leads, as with tensor, pipeline and context parallelism of 1, and has its share of the
sequences as Python lists, as the servers' answers leave them.

    python tools/benchmark_share.py --ranks 8 --sequences 1024 --tokens 32768
"""

import argparse
import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from klear_megatron.data import DataConfig, Prompt
from klear_megatron.policy.config import OptimizerConfig, PolicyConfig
from klear_megatron.rewards import Reward
from klear_megatron.rl.batches import batch_of
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group
from klear_megatron.rl.metrics import group_metrics
from klear_megatron.rl.sharing import share
from klear_megatron.rollout import Response

PROMPT_TOKENS, RESPONSES, VOCABULARY = 512, 8, 150_000


def make_groups(sequences: int, tokens: int, seed: int) -> list[Group]:
    draw = random.Random(seed)
    length = tokens - PROMPT_TOKENS
    groups = []
    for _ in range(sequences // RESPONSES):
        responses = [
            Response(
                [draw.randrange(VOCABULARY) for _ in range(length)],
                [-draw.random() for _ in range(length)],
                "stop",
                "0",
            )
            for _ in range(RESPONSES)
        ]
        rewards = [Reward(float(i % 2), correct=True, formatted=True) for i in range(RESPONSES)]
        advantages = [reward.score - 0.5 for reward in rewards]
        prompt = list(range(PROMPT_TOKENS))
        texts = [""] * RESPONSES
        groups.append(Group(Prompt("", [], "", 0), prompt, responses, texts, rewards, advantages))
    return groups


def peak() -> int:
    """The peak of this process's memory in bytes since it started or since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak() -> int:
    """Lets the peak begin at the memory in use, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def rank_main(rank: int, ranks: int, sequences: int, tokens: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    nowhere = Path("unused")
    config = RLConfig(
        run_dir=nowhere,
        steps=1,
        data=DataConfig(path=nowhere),
        policy=PolicyConfig(path=nowhere, optimizer=OptimizerConfig(lr=1e-6)),
    )
    groups = make_groups(sequences // ranks, tokens, seed=rank)
    # Opens all connections.
    share(batch_of(groups[:1], config), range(ranks), limit=1)
    dist.barrier()
    before, sent_before = reset_peak(), psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    dist.barrier()
    started = time.perf_counter()
    batch, _ = share(batch_of(groups, config), range(ranks), limit=sequences)
    group_metrics(groups, 0)
    seconds = time.perf_counter() - started
    dist.barrier()
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - sent_before
    measured = torch.tensor([seconds, peak() - before, float(batch.tokens.sum())])
    everyone = [torch.empty_like(measured) for _ in range(ranks)]
    dist.all_gather(everyone, measured)
    if rank == 0:
        time_s, memory, checksum = torch.stack(everyone).T
        assert (checksum == checksum[0]).all()
        number = len(batch.tokens)
        print(
            f"{ranks} ranks, {len(batch.lengths)} sequences, {number / 1e6:.1f} M tokens: "
            f"{time_s.max():.2f} s; per token and rank, {sent / ranks / number:.1f} bytes over the "
            f"loopback device and {memory.max() / number:.1f} bytes of peak memory"
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32768, help="per sequence")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=rank_main, args=(rank, args.ranks, args.sequences, args.tokens, port)
        )
        for rank in range(args.ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()

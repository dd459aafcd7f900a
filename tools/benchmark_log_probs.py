"""Time and peak memory of log-probabilities with their gradients: ours against whole logits.

    python tools/benchmark_log_probs.py [--vocab 151936] [--hidden 2048] [--tokens 512 1024 ...]

Every measurement runs in a process of its own, thrice; the best time counts, and the first peak.
Extra memory is the peak resident set minus that before the call, which holds the hidden states, the
output weight and its gradient already; a second such gradient, which is then added to it, is extra.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from klear_megatron.models.log_probs import vocab_parallel_log_probs
from klear_megatron.platform.device import init_distributed


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What most trainers do."""
    logits = hidden @ weight.T
    return logits.float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours, on one rank."""
    world: Any = dist.group.WORLD
    log_probs, _ = vocab_parallel_log_probs(
        hidden, weight, labels=labels, vocab_size=len(weight), group=world
    )
    return log_probs


def measure(
    way: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, hidden: int, vocab: int
) -> tuple[float, float]:
    """Seconds and MiB of one forward and backward."""
    init_distributed()
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    labels = torch.randint(vocab, (tokens,))
    before = psutil.Process().memory_info().rss
    seconds, peaks = [], []
    for _ in range(3):
        start = time.perf_counter()
        way(states, weight, labels).sum().backward()
        seconds.append(time.perf_counter() - start)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return min(seconds), (peaks[0] - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    arguments = parser.parse_args()
    print("| tokens | whole logits, s | MiB | chunked, s | MiB |")
    print("|---|---|---|---|---|")
    for tokens in arguments.tokens:
        cells = []
        for way in (whole, chunked):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, mebibytes = pool.apply(
                    measure, (way, tokens, arguments.hidden, arguments.vocab)
                )
            cells += [f"{seconds:.1f}", f"{mebibytes:,.0f}"]
        print(f"| {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

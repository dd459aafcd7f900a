"""Trains a few layers of an 8B model on one GPU in BF16 and in FP8, and compares the losses.

    python tools/gpu_check.py [--recipe blockwise] [--layers 4] [--tokens 32768] [--steps 4]

Prints tokens/s, MFU, peak memory and the largest relative difference of the losses, and exits with
1 if that is above `--tolerance`, a loss is not finite or does not fall, or FP8 could not be had.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from transformers import Qwen3Config, Qwen3ForCausalLM

from klear_megatron import platform
from klear_megatron.losses import SFTObjective
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import OptimizerConfig, PolicyConfig
from klear_megatron.policy.kernels import Installed, choose_kernels
from klear_megatron.policy.policy import Policy

_H100_BF16_FLOPS = 989e12


def training_flops(hf: Any, tokens: int) -> float:
    """Of one step on one sequence: thrice the forward pass's, with half of the attention matrix."""
    head, width = hf.head_dim, hf.num_attention_heads * hf.head_dim
    projections = hf.hidden_size * (2 * width + 2 * hf.num_key_value_heads * head)
    layer = projections + 3 * hf.hidden_size * hf.intermediate_size
    weights = hf.num_hidden_layers * layer + hf.vocab_size * hf.hidden_size
    attention = hf.num_hidden_layers * width * tokens
    return 3 * 2 * tokens * (weights + attention)


def train(config: PolicyConfig, tokens: int, steps: int) -> list[float]:
    """Losses of training on one random sequence; prints what it cost."""
    if platform.HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    policy = Policy(config, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    sequence = torch.randint(policy.hf.vocab_size, (tokens,), generator=generator).tolist()
    batch = Batch.from_sequences([sequence], loss_mask=[[1.0] * tokens])
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(policy.train_step(batch, SFTObjective())["loss"])
        if platform.HAS_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = tokens / min(seconds)
    mfu = training_flops(policy.hf, tokens) / min(seconds) / _H100_BF16_FLOPS
    memory = torch.cuda.max_memory_allocated() / 2**30 if platform.HAS_GPU else math.nan
    print(
        f"{config.fp8 or config.dtype}: {rate:,.0f} tokens/s, MFU {mfu:.1%} (H100, BF16), "
        f"peak memory {memory:.1f} GiB, losses {[round(loss, 4) for loss in losses]}",
        flush=True,
    )
    del policy
    parallel_state.destroy_model_parallel()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="blockwise")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=0.02)
    arguments = parser.parse_args()
    hf = Qwen3Config(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(1, arguments.hidden // 512),
        head_dim=128,
        max_position_embeddings=arguments.tokens,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        Qwen3ForCausalLM(hf).bfloat16().save_pretrained(path)
        bfloat16 = PolicyConfig(
            path=path,
            tokens_per_micro_batch=arguments.tokens,
            recompute_granularity="selective",
            recompute_modules=("mlp",),
            optimizer=OptimizerConfig(lr=1e-4),
        )
        fp8 = PolicyConfig.model_validate({**bfloat16.model_dump(), "fp8": arguments.recipe})
        missing = choose_kernels(fp8, Installed.here(), experts=False).warnings
        ours, theirs = (train(c, arguments.tokens, arguments.steps) for c in (fp8, bfloat16))
    difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"largest relative difference of the losses: {difference:.2%}")
    problems = [
        *missing,
        *(["a loss is not finite"] if not all(map(math.isfinite, ours + theirs)) else []),
        *(
            ["the losses do not fall"]
            if not (ours[-1] < ours[0] and theirs[-1] < theirs[0])
            else []
        ),
        *(
            [f"they differ by more than {arguments.tolerance:.0%}"]
            if not difference <= arguments.tolerance
            else []
        ),
    ]
    for problem in problems:
        print(f"FAILED: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

"""Trains a few layers of an 8B model on one GPU in BF16, in FP8, and in FP8 with weights kept in
FP8 too, and compares the losses and what has become of the first layer's weights.

    python tools/gpu_check.py [--recipe blockwise] [--layers 4] [--tokens 32768] [--steps 4]

Prints tokens/s, MFU, peak memory and the largest relative differences, and exits with 1 if the
losses' is above `--tolerance` or the weights' above what rounding to FP8 explains, a loss is not
finite or does not fall, or FP8 could not be had.
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

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import SFTObjective
from klear_megatron.platform.device import HAS_GPU
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import OptimizerConfig, PolicyConfig
from klear_megatron.policy.kernels import Installed, choose_kernels
from klear_megatron.policy.learner import Learner

_H100_BF16_FLOPS = 989e12
_FP8_ROUNDING = 2**-4
"""Relative, of E4M3's three bits of mantissa."""


def training_flops(hf: Any, tokens: int) -> float:
    """Of one step on one sequence: thrice the forward pass's, with half of the attention matrix."""
    head, width = hf.head_dim, hf.num_attention_heads * hf.head_dim
    projections = hf.hidden_size * (2 * width + 2 * hf.num_key_value_heads * head)
    layer = projections + 3 * hf.hidden_size * hf.intermediate_size
    weights = hf.num_hidden_layers * layer + hf.vocab_size * hf.hidden_size
    attention = hf.num_hidden_layers * width * tokens
    return 3 * 2 * tokens * (weights + attention)


def train(
    config: PolicyConfig, tokens: int, steps: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of training on one random sequence, and the first layer's weights after it; prints
    what it cost."""
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    learner = Learner(config, ModelFolder(config.path), total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    vocab_size = learner.model.folder.config.vocab_size
    sequence = torch.randint(vocab_size, (tokens,), generator=generator).tolist()
    batch = Batch.from_sequences([sequence], loss_mask=[[1.0] * tokens])
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(learner.train_step(batch, SFTObjective())["loss"])
        if HAS_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = tokens / min(seconds)
    mfu = training_flops(learner.model.folder.config, tokens) / min(seconds) / _H100_BF16_FLOPS
    memory = torch.cuda.max_memory_allocated() / 2**30 if HAS_GPU else math.nan
    name = (config.fp8 or config.dtype) + (" weights too" if config.fp8_param_gather else "")
    print(
        f"{name}: {rate:,.0f} tokens/s, MFU {mfu:.1%} (H100, BF16), "
        f"peak memory {memory:.1f} GiB, losses {[round(loss, 4) for loss in losses]}",
        flush=True,
    )
    weights = {n: t.float().cpu() for n, t in learner.model.named_hf_tensors() if "layers.0." in n}
    del learner
    parallel_state.destroy_model_parallel()
    return losses, weights


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of any pair, in relation to the second."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


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
        weights = PolicyConfig.model_validate({**fp8.model_dump(), "fp8_param_gather": True})
        kernels = choose_kernels(weights, Installed.here(), experts=False)
        (expected, after), *others = (
            train(config, arguments.tokens, arguments.steps) for config in (bfloat16, fp8, weights)
        )
    difference = max(
        largest_difference(list(torch.tensor(losses)), list(torch.tensor(expected)))
        for losses, _ in others
    )
    drift = max(
        largest_difference(list(theirs.values()), list(after.values())) for _, theirs in others
    )
    print(f"largest relative difference to BF16: losses {difference:.2%}, weights {drift:.2%}")
    all_losses = [expected, *(losses for losses, _ in others)]
    for line in kernels.warnings:
        print(line)
    failures = {
        "FP8 could not be had": kernels.transformer["fp8"] is None,
        "a loss is not finite": not all(
            math.isfinite(loss) for losses in all_losses for loss in losses
        ),
        "losses do not fall": any(losses[-1] >= losses[0] for losses in all_losses),
        f"losses differ by more than {arguments.tolerance:.0%}": not (
            difference <= arguments.tolerance
        ),
        f"weights differ by more than {_FP8_ROUNDING:.0%}": not drift <= _FP8_ROUNDING,
    }
    problems = [problem for problem, found in failures.items() if found]
    for problem in problems:
        print(f"FAILED: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

"""A measured step of the trainer beside its plan, on whatever this machine has.

    python tools/benchmark_plan.py [--length 2048] [--recompute full] [--out rows.jsonl]
    torchrun --nproc-per-node 2 tools/benchmark_plan.py --cp 2

Trains a random Qwen3 on random tokens through the same Learner as a run. The first step is left
out; of the others the fastest counts. Adds a row to `--out`: the plan and
what was measured.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import SFTObjective
from klear_megatron.planning import Work, hardware_here, plan
from klear_megatron.platform import objects
from klear_megatron.platform.device import HAS_GPU, init_distributed
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.policy.learner import Learner


def make_policy(options: argparse.Namespace, folder: str) -> PolicyConfig:
    """The policy of a random model, which the first rank writes."""
    path = objects.broadcast(folder)
    if dist.get_rank() == 0:
        config = Qwen3Config(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 128,
            head_dim=64,
            max_position_embeddings=options.length,
            tie_word_embeddings=False,
        )
        Qwen3ForCausalLM(config).save_pretrained(path)
    dist.barrier()
    return PolicyConfig.model_validate(
        {
            "path": path,
            "dtype": options.dtype,
            "tokens_per_micro_batch": options.length // options.cp,
            "recompute_granularity": options.recompute,
            "optimizer": {"lr": 1e-5},
            "parallel": {
                "tensor_model_parallel_size": options.tp,
                "context_parallel_size": options.cp,
                "pipeline_model_parallel_size": options.pp,
            },
        }
    )


def measure(policy: PolicyConfig, options: argparse.Namespace) -> float:
    """Seconds of the fastest step but the first."""
    learner = Learner(policy, ModelFolder(policy.path), total_steps=options.steps)
    lengths = [options.length] * options.sequences
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(options.vocabulary, (n,), generator=generator).tolist() for n in lengths]
    batch = Batch.from_sequences(rows, loss_mask=[[1.0] * n for n in lengths])
    times = []
    for _ in range(options.steps):
        dist.barrier()
        start = time.perf_counter()
        learner.train_step(batch, SFTObjective())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        *(("hidden", 512), ("layers", 4), ("vocabulary", 8192), ("length", 1024)),
        *(("sequences", 4), ("steps", 3), ("tp", 1), ("cp", 1), ("pp", 1)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16" if HAS_GPU else "float32")
    parser.add_argument("--recompute", choices=["full", "selective"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    init_distributed()
    hardware = hardware_here()
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(options, folder)
        work = Work((options.length,) * options.sequences)
        planned = plan(policy, work, gpus=dist.get_world_size(), hardware=hardware)
        seconds = measure(policy, options)
        dist.barrier()
    if dist.get_rank() == 0:
        print(
            f"planned {planned.seconds.total:.2f} s, measured {seconds:.2f} s: "
            f"{planned.seconds.total / seconds - 1:+.0%}"
        )
        row: dict[str, Any] = {"options": vars(options) | {"out": None}, "measured_s": seconds}
        row |= {"plan": planned.as_json(), "hardware": hardware.model_dump()}
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

"""Memory and time of saving and loading a checkpoint, per data-parallel rank, on the CPU.

    torchrun --standalone --nproc-per-node 4 tools/benchmark_checkpoints.py

Makes a random Qwen3 of about 45M parameters, takes one step, saves, and loads. Prints, for the rank
that needed the most, by how much the resident memory rose at its highest. Linux only.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import SFTObjective
from klear_megatron.platform import objects
from klear_megatron.platform.device import init_distributed
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.policy.learner import Learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    arguments = parser.parse_args()
    init_distributed()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(objects.broadcast(own))
        if dist.get_rank() == 0:
            _write_model(folder / "model", arguments.layers, arguments.hidden)
        dist.barrier()
        learner = _trained(folder / "model")
        parameters = sum(p.numel() for chunk in learner.model.chunks for p in chunk.parameters())
        saving = _measure(learner.save, folder / "checkpoint", {"step": 1})
        loading = _measure(learner.load, folder / "checkpoint")
        own_part = 2 * parameters + 12 * parameters // dist.get_world_size()
        if dist.get_rank() == 0:
            print(
                f"DP {dist.get_world_size()}: {parameters / 1e6:.0f}M parameters; a rank's weights "
                f"and optimizer state {own_part / 2**20:.0f} MiB, whole state "
                f"{14 * parameters / 2**20:.0f} MiB"
            )
            for verb, (seconds, rise) in {"save": saving, "load": loading}.items():
                print(f"  {verb}: {seconds:.1f} s, +{rise / 2**20:.0f} MiB")
        dist.barrier()


def _write_model(path: Path, layers: int, hidden: int) -> None:
    config = Qwen3Config(
        vocab_size=16384,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def _trained(path: Path) -> Learner:
    config = PolicyConfig.model_validate({"path": path, "optimizer": {"lr": 1e-4}})
    learner = Learner(config, ModelFolder(path), total_steps=10)
    sequences = [[1, 2, 3, 4, 5, 6, 7, 8]] * dist.get_world_size()
    batch = Batch.from_sequences(sequences, loss_mask=[[1.0] * 8] * len(sequences))
    learner.train_step(batch, SFTObjective())
    return learner


def _measure(function: Callable[..., Any], *arguments: Any) -> tuple[float, int]:
    """Seconds, and by how many bytes this process's resident memory rose at its highest; the
    largest of all ranks."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = _memory("VmRSS"), time.perf_counter()
    function(*arguments)
    mine = time.perf_counter() - start, _memory("VmHWM") - before
    everyone = objects.all_gather(mine)
    return max(seconds for seconds, _ in everyone), max(rise for _, rise in everyone)


def _memory(field: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc has no {field}")


if __name__ == "__main__":
    main()

"""Training throughput on this machine: our learner, packed, against Hugging Face with padding.

    python tools/benchmark_training.py [--steps 3] [--budget 4096]

The same model of about 100M parameters, the same sequences, float32, AdamW, one process with all
its threads. Both work on micro-batches of at most `--budget` tokens, which for Hugging Face count
the padding: as many sequences, in the order of the data, as fit when padded to the longest. Steps
of the two alternate, so that what else the machine does falls on both; the best of each counts.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import SFTObjective
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import OptimizerConfig, PolicyConfig
from klear_megatron.policy.learner import Learner

CONFIG = Qwen3Config(
    vocab_size=32_000,
    hidden_size=640,
    intermediate_size=1728,
    num_hidden_layers=12,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)


def padded_batches(sequences: list[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Consecutive sequences as long as their number times the longest stays in the budget."""
    batch: list[list[int]] = []
    for sequence in sequences:
        longest = max(len(each) for each in [*batch, sequence])
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(sequence)
    yield batch


Step = Callable[[list[list[int]]], None]
"""One optimizer step on these sequences."""


def hugging_face(path: Path, budget: int) -> Step:
    """Plain PyTorch."""
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(sequences: list[list[int]]) -> None:
        total = sum(len(sequence) - 1 for sequence in sequences)
        for batch in padded_batches(sequences, budget):
            longest = max(map(len, batch))
            tokens = torch.tensor([s + [0] * (longest - len(s)) for s in batch])
            mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in batch])
            logits = model(tokens, attention_mask=mask).logits[:, :-1]
            labels = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
            )
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def ours(path: Path, budget: int) -> Step:
    """Megatron's schedule on one rank."""
    config = PolicyConfig(
        path=path,
        dtype="float32",
        tokens_per_micro_batch=budget,
        optimizer=OptimizerConfig(lr=1e-4),
    )
    learner = Learner(config, ModelFolder(config.path), total_steps=100)

    def step(sequences: list[list[int]]) -> None:
        mask = [[1.0] * len(sequence) for sequence in sequences]
        learner.train_step(Batch.from_sequences(sequences, loss_mask=mask), SFTObjective())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
    draw = random.Random(0)
    lengths = {
        "64 to 2048, log-uniform": [
            round(64 * 32 ** draw.random()) for _ in range(arguments.sequences)
        ],
        "all 512": [512] * arguments.sequences,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        Qwen3ForCausalLM(CONFIG).save_pretrained(path)
        ways = [hugging_face(path, arguments.budget), ours(path, arguments.budget)]
        print("| lengths | tokens | Hugging Face, tokens/s | ours, tokens/s | ratio |")
        print("|---|---|---|---|---|")
        for name, row in lengths.items():
            sequences = [[draw.randrange(CONFIG.vocab_size) for _ in range(n)] for n in row]
            seconds: list[list[float]] = [[], []]
            for _ in range(1 + arguments.steps):
                for way, step in enumerate(ways):
                    start = time.perf_counter()
                    step(sequences)
                    seconds[way].append(time.perf_counter() - start)
            # The first one allocates.
            theirs, mine = (sum(row) / min(each[1:]) for each in seconds)
            print(
                f"| {name} | {sum(row)} | {theirs:.0f} | {mine:.0f} | {mine / theirs:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

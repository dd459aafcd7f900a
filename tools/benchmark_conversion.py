"""Speed and peak memory of the converters, beside `cp` of the same bytes on the same disk.

    python tools/benchmark_conversion.py [--shape 1.7B] [--folder /tmp]

A random bfloat16 Qwen3 of the shape is written into a temporary folder, row by row; needs about
three times its size there. Each measurement runs in a process of its own, after its input has been
read into the page cache as far as that fits, and ends when the bytes are on the disk.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen3Config

from klear_megatron.checkpoints.hf_writer import shard_names, write_index, write_shard
from klear_megatron.checkpoints.plan import SHARD_BYTES, Move, in_shards
from klear_megatron.conversion.convert import hf_to_megatron, megatron_to_hf
from klear_megatron.conversion.verify import compare_weights
from klear_megatron.models import get_architecture

# hidden, intermediate, layers, heads, tied
_SHAPES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "8B": (4096, 12288, 36, 32, False),
}


def write_random(folder: Path, shape: str) -> int:
    """A Hugging Face folder with one row of the table in memory; returns the weights' bytes."""
    hidden, intermediate, layers, heads, tied = _SHAPES[shape]
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    table = get_architecture(config).weights(config, config.vocab_size)
    shards = in_shards([Move(row, torch.bfloat16) for row in table], SHARD_BYTES)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        specs = [spec for move in shard for spec in move.specs]
        with (folder / name).open("wb") as file:
            write_shard(file, specs, (torch.randn(s, dtype=dtype) for _, dtype, s in specs))
    nbytes = sum(move.nbytes for shard in shards for move in shard)
    if len(shards) > 1:
        files = {n: f for f, s in zip(names, shards, strict=True) for m in s for n in m.row.sources}
        write_index(folder, files, nbytes)
    return nbytes


def copy(source: Path, out: Path) -> None:
    """What the converters are compared with."""
    subprocess.run(["/bin/cp", "-r", source, out], check=True)
    subprocess.run(["/bin/sync", "--file-system", out], check=True)


class Measurement(NamedTuple):
    """Of one run."""

    seconds: float
    cpu_seconds: float
    """Of this process, the kernel's for it included."""
    peak: float
    """Resident GB, pages of mapped files included."""


def measure(work: Callable[[Path, Path], None], source: Path, out: Path) -> Measurement:
    """Of this process."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work(source, out)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Measurement(seconds, cpu_seconds, peak)


def in_process(work: Callable[[Path, Path], None], source: Path, out: Path) -> Measurement:
    """`measure` in a process of its own."""
    for file in (file for file in source.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as stream:  # into the page cache
            while stream.read(1 << 24):
                pass
    subprocess.run(["/bin/sync"], check=True)  # nobody writes back another's bytes
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, work, source, out).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=_SHAPES, default="1.7B")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        (folder / "hf").mkdir()
        nbytes = write_random(folder / "hf", arguments.shape)
        table = [
            f"Qwen3 {arguments.shape}, bfloat16, {nbytes / 1e9:.2f} GB; {os.cpu_count()} CPU "
            f"cores, load average {os.getloadavg()[0]:.1f} before",
            "",
            "| | s | GB/s | cp just before, GB/s | of cp's speed | CPU s | peak RSS, GB |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, work, source, out in (
            ("HF → Megatron", hf_to_megatron, "hf", "megatron"),
            ("Megatron → HF", megatron_to_hf, "megatron", "back"),
        ):
            cp = in_process(copy, folder / source, folder / "copy")
            shutil.rmtree(folder / "copy")
            ours = in_process(work, folder / source, folder / out)
            speeds = [f"{nbytes / run.seconds / 1e9:.2f}" for run in (ours, cp)]
            ratio = f"{cp.seconds / ours.seconds:.0%}"
            cells = [f"{ours.seconds:.1f}", *speeds, ratio, f"{ours.cpu_seconds:.1f}"]
            table.append(f"| {name} | {' | '.join(cells)} | {ours.peak:.2f} |")
        print("\n".join(table), flush=True)
        different = compare_weights(folder / "hf", folder / "back").differing
        print(f"{len(different)} tensors differ after both" if different else "bit-identical")


if __name__ == "__main__":
    main()

"""Measures how long a push of weights to real SGLang servers takes, beside a bare broadcast.

    python tools/benchmark_weight_sync.py --layers 16 40 --servers 1 2

For each size of model and number of servers, pushes and gloo broadcasts of the same bytes to as
many processes alternate, so that what else the machine does falls on both; medians count. A server
needs the interpreter of the rollout environment (`make setup`).
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import Qwen3Config, Qwen3ForCausalLM

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.platform.device import init_distributed
from klear_megatron.policy.config import ModelConfig
from klear_megatron.policy.model import Model
from klear_megatron.rollout import RolloutConfig, serving
from klear_megatron.rollout.server_side.klear_weight_loader import make_group
from klear_megatron.rollout.weight_sync import WeightSync

CPU = torch.device("cpu")


def write_model(path: Path, layers: int) -> Path:
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32768,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def receive_bare(
    rank: int, size: int, port: int, bytes_: int, ready: Barrier, done: Barrier
) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    group = make_group(store, 0, rank, size, timedelta(seconds=60), CPU)
    data = torch.zeros(bytes_, dtype=torch.uint8)
    while True:
        ready.wait()
        group.broadcast(data, 0).wait()
        done.wait()


class BareBroadcast:
    """A gloo broadcast from this process to `receivers` others, from and into warm memory."""

    def __init__(self, receivers: int, bytes_: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ready, self._done = context.Barrier(receivers + 1), context.Barrier(receivers + 1)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes = [
            context.Process(
                target=receive_bare,
                args=(rank, receivers + 1, store.port, bytes_, self._ready, self._done),
                daemon=True,
            )
            for rank in range(1, receivers + 1)
        ]
        for process in self._processes:
            process.start()
        self._group = make_group(store, 0, 0, receivers + 1, timedelta(seconds=60), CPU)
        self._store = store
        self._data = torch.zeros(bytes_, dtype=torch.uint8)
        self.seconds()

    def seconds(self) -> float:
        self._ready.wait()
        start = time.perf_counter()
        self._group.broadcast(self._data, 0).wait()
        self._done.wait()
        return time.perf_counter() - start

    def end(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def measure(model: Model, folder: Path, servers: int, pushes: int, bucket_bytes: int) -> None:
    config = RolloutConfig(
        num_servers=servers,
        mem_fraction_static=0.2,
        sync_bucket_bytes=bucket_bytes,
        extra_args=["--max-total-tokens", "2000", "--skip-tokenizer-init"],
    )
    tensors = model.placed_hf_tensors
    size = sum(tensor.dtype.itemsize * torch.Size(tensor.shape).numel() for tensor in tensors)
    pushed, bare = [], []
    with serving(config, model.folder.path, folder, own_weights=True) as running:
        broadcast = BareBroadcast(servers, size)
        with WeightSync(running.urls, config, tensors) as sync:
            for version in range(1, pushes + 2):
                start = time.perf_counter()
                sync.push(model.own_hf_tensors(), version)
                pushed.append(time.perf_counter() - start)
                bare.append(broadcast.seconds())
        broadcast.end()
    first, *pushed = pushed
    push_s, bare_s = statistics.median(pushed), statistics.median(bare[1:])
    print(
        f"{size / 1e9:.2f} GB to {servers} server{'s' if servers > 1 else ''}: push {push_s:.2f} s "
        f"(first {first:.2f} s, {min(pushed):.2f} to {max(pushed):.2f}), bare broadcast "
        f"{bare_s:.2f} s ({min(bare[1:]):.2f} to {max(bare[1:]):.2f}): "
        f"{bare_s / push_s:.2f} of its speed",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 34])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pushes", type=int, default=7)
    parser.add_argument("--bucket-bytes", type=int, default=RolloutConfig().sync_bucket_bytes)
    args = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init_distributed()
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = write_model(folder / "model", layers)
            model = Model(ModelConfig(path=path, dtype="bfloat16"), ModelFolder(path))
            model.load(path)
            for servers in args.servers:
                measure(model, folder / "logs", servers, args.pushes, args.bucket_bytes)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

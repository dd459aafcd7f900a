"""Finds the processes of SGLang servers and checks what servers answer."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from klear_megatron.platform.tensors import PlacedTensor
from klear_megatron.rollout import Response, RolloutConfig
from klear_megatron.rollout.weight_sync import WeightSync
from tests.models import tiny


def servers_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The servers themselves, without the guards that they run under."""
    return [server for server, _ in _servers_and_words(processes)]


def server_at(url: str) -> psutil.Process:
    """The process of the server that listens at this address."""
    port = url.rpartition(":")[2]
    servers = _servers_and_words(psutil.Process().children(recursive=True))
    (server,) = (one for one, words in servers if words[words.index("--port") + 1] == port)
    return server


def _servers_and_words(
    processes: Iterable[psutil.Process],
) -> Iterator[tuple[psutil.Process, list[str]]]:
    """The servers and their command lines, read once: a server may end at any moment."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if "sglang.launch_server" in words and "-I" not in words:
                yield process, words


def log_prob_difference(model: PreTrainedModel, prompt: list[int], response: Response) -> float:
    """The largest difference between the server's log-probabilities and Hugging Face's."""
    with torch.no_grad():
        log_probs, _ = tiny.hf_log_probs(model, [prompt + response.token_ids])
    return (torch.tensor(response.log_probs) - log_probs[len(prompt) :]).abs().max().item()


@contextlib.contextmanager
def syncing(
    urls: list[str], config: RolloutConfig, tensors: Mapping[str, Tensor]
) -> Iterator[WeightSync]:
    """A trainer of one rank, this process, that has tensors of these names, types and shapes."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        placed = [PlacedTensor(name, t.dtype, tuple(t.shape), 0) for name, t in tensors.items()]
        with WeightSync(urls, config, placed) as sync:
            yield sync
    finally:
        dist.destroy_process_group()

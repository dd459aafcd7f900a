"""Finds the processes of SGLang servers and checks what servers answer."""

import contextlib
from collections.abc import Iterable

import psutil
import torch
from transformers import PreTrainedModel

from klear_megatron.rollout import Response
from tests.models import tiny


def servers_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The servers themselves, without the guards that they run under."""
    servers = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if "sglang.launch_server" in words and "-I" not in words:
                servers.append(process)
    return servers


def server_at(url: str) -> psutil.Process:
    """The process of the server that listens at this address."""
    port = url.rpartition(":")[2]
    everyone = psutil.Process().children(recursive=True)
    (server,) = (server for server in servers_among(everyone) if port in server.cmdline())
    return server


def log_prob_difference(model: PreTrainedModel, prompt: list[int], response: Response) -> float:
    """The largest difference between the server's log-probabilities and Hugging Face's."""
    with torch.no_grad():
        log_probs, _ = tiny.hf_log_probs(model, [prompt + response.token_ids])
    return (torch.tensor(response.log_probs) - log_probs[len(prompt) :]).abs().max().item()

"""Chooses the ports of SGLang servers."""

import itertools
import random
import socket
from typing import NamedTuple

from klear_megatron.errors import UserError
from klear_megatron.rollout.config import RolloutConfig

_FREE_PORTS = range(15000, 31000)
"""Below the ports that the kernel gives to outgoing connections. A server starts to listen seconds
after its port was chosen, and does not start if the port has been taken in the meantime."""


class Ports(NamedTuple):
    """Where one server listens."""

    http: int
    """For requests."""
    nccl: int
    """For the process group of the server's own ranks. SGLang would choose one of the kernel's."""


def take_ports(config: RolloutConfig) -> list[Ports]:
    """Free ports for each server that `rollout` starts.

    Raises:
        UserError: a port that `rollout.port` asks for is in use.
    """
    # Not from the run's seed: runs on the same host must not try the same ports.
    start = random.SystemRandom().choice(_FREE_PORTS)
    asked = _asked_for(config)
    free = (
        port
        for port in range(start, start + 1000)
        if port not in asked and not _why_taken(config.host, port)
    )
    http = asked or list(itertools.islice(free, config.num_servers))
    return [Ports(*pair) for pair in zip(http, free, strict=False)]


def _asked_for(config: RolloutConfig) -> list[int]:
    if config.port is None:
        return []
    ports = [config.port + index for index in range(config.num_servers)]
    for port in ports:
        if reason := _why_taken(config.host, port):
            raise UserError(
                f"rollout.port: cannot listen on {config.host}:{port}: {reason}; stop what uses "
                "it, choose another port, or leave rollout.port out to use a free one"
            )
    return ports


def _why_taken(host: str, port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None

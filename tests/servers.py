"""Finding the processes of SGLang servers, to kill them."""

import contextlib
from collections.abc import Iterable

import psutil


def servers_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The servers themselves, not the guards that they run under."""
    servers = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if "sglang.launch_server" in words and "-I" not in words:
                servers.append(process)
    return servers


def server_at(url: str) -> psutil.Process:
    """The one that listens there."""
    port = url.rpartition(":")[2]
    everyone = psutil.Process().children(recursive=True)
    (server,) = (server for server in servers_among(everyone) if port in server.cmdline())
    return server

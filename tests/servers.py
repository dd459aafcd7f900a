"""Finding the processes of SGLang servers, to kill them."""

from collections.abc import Iterable

import psutil


def servers_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The servers themselves, not the guards that they run under."""
    commands = {process: process.cmdline() for process in processes}
    return [
        process
        for process, words in commands.items()
        if "sglang.launch_server" in words and "-I" not in words
    ]


def server_at(url: str) -> psutil.Process:
    """The one that listens there."""
    port = url.rpartition(":")[2]
    everyone = psutil.Process().children(recursive=True)
    (server,) = (server for server in servers_among(everyone) if port in server.cmdline())
    return server

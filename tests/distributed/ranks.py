"""Runs a function on N ranks joined by gloo, as torchrun would start them, but cheaply.

The ranks are forked from one server process that has imported Megatron-Core already, so that a
test pays for its own work only.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["klear_megatron.policy.learner", "transformers"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120
) -> list[Any]:
    """Calls `function(*args)` on every rank of a fresh world and returns the answers by rank.

    Args:
        function: of a module, so that it can be named to another process.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or on a time-out. No rank
            is left running either way.
    """
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            arguments = rank, world_size, folder, sender, function, args
            processes.append(_context.Process(target=_rank_main, args=arguments))
            processes[-1].start()
            sender.close()
            pipes[receiver] = rank
        try:
            while pipes:
                ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
                missing = sorted(pipes.values())
                assert ready, f"ranks {missing} of {world_size} still ran after {timeout} s"
                for receiver in ready:
                    rank = pipes.pop(receiver)
                    try:
                        failure, results[rank] = pickle.loads(receiver.recv_bytes())
                    except EOFError:
                        failure = "died without a word"
                    assert not failure, f"rank {rank} of {world_size}: {failure}"
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.exitcode != 0:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
                process.join()
    return [results[rank] for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test run
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        answer: tuple[str | None, Any] = (None, function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    sender.send_bytes(pickle.dumps(answer))  # by value: `send` would share tensors' memory

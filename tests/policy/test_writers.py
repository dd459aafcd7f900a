"""The processes that write checkpoints outlive signals that are sent to all processes of a rank."""

import subprocess
import sys
import threading

import psutil

from tests.commands import ROOT, environment


def main() -> None:
    """Sends SIGTERM to all children while they start, and later SIGKILL to the one that keeps the
    queue; says whether the queue keeps something."""
    # Here, because the processes that it starts import this module first.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from klear_megatron.policy.writers import prepare_writers

    started = threading.Event()

    def tell() -> None:
        while not started.wait(0.01):
            for child in psutil.Process().children():
                child.terminate()

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        prepare_writers()
    finally:
        started.set()
        teller.join()
    filesystem_async._results_queue.put("kept")
    print(filesystem_async._results_queue.get_nowait())
    for child in psutil.Process().children():
        if any("spawn_main" in word for word in child.cmdline()):
            child.kill()
            child.wait()
    prepare_writers()
    filesystem_async._results_queue.put("kept again")
    print(filesystem_async._results_queue.get_nowait())


def test_sigterm_to_all_processes_of_a_rank_leaves_the_queue_and_after_sigkill_there_is_another():
    # In a process that has started no other yet.
    command = [sys.executable, "-m", "tests.policy.test_writers"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.stdout.endswith("kept\nkept again\n"), result.stderr


if __name__ == "__main__":
    main()

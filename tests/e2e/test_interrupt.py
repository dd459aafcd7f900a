"""Ctrl-C and SIGTERM while servers start end all ranks within seconds, and all they started."""

import contextlib
import functools
import os
import signal
import subprocess
import time

import psutil
import pytest

from tests.commands import ROOT, command_line, environment


@pytest.mark.parametrize(
    ("ranks", "told", "code", "last"),
    [
        (None, signal.SIGINT, 130, "interrupted"),
        (2, signal.SIGINT, 130, "interrupted"),
        (2, signal.SIGTERM, 75, "told to stop; run it again to go on"),
    ],
)
def test_told_to_end_while_servers_start(
    make_config, quickstart, tmp_path, ranks, told, code, last
):
    # In place of SGLang, what never answers.
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    overrides = ["--policy.path", str(quickstart / "base"), "--rollout.python", str(silent)]
    with subprocess.Popen(
        command_line("rl", str(make_config("rl")), *overrides, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job hands on that it is ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as command:
        deadline = time.monotonic() + 120
        started: list[psutil.Process] = []
        while not any(_is_silent(process) for process in started):
            assert command.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
            started = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, told)
        # A rank that hears nothing is killed by torchrun after 30 s.
        _, errors = command.communicate(timeout=15)
    assert command.returncode == code
    assert errors.splitlines()[-1] == last
    assert errors.count(last) == 1
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


def _is_silent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline() == ["sleep", "600"]
    return False

"""Runs a command that must not outlive its parent: `python guard.py COMMAND...`; see `guarded`.

The parent holds the write end of this process's standard input. When that closes, because the
parent wants it or has died, the command and everything it started get SIGTERM, and after ten
seconds SIGKILL. A guard imports only the standard library, so it costs a few milliseconds and
megabytes.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 10.0


def guarded(command: list[str]) -> list[str]:
    """The command line that runs `command` under a guard, which itself runs under another guard.

    If one of them is killed, the other ends the command and everything it started: the outer one
    because the inner one has ended, the inner one because its parent has died.
    """
    guard = [sys.executable, "-I", "-S", __file__]
    return [*guard, *guard, *command]


def main() -> int:
    # Ctrl-C and hang-ups reach the whole terminal group; the parent decides what happens.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Orphans of the command become children of this process, so none can hide.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.PIPE,  # closes when this process ends, however it ends
        start_new_session=True,
        preexec_fn=_begin,
    )
    while command.poll() is None and not _parent_is_done():
        pass
    _signal_descendants(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while _reap() and time.monotonic() < deadline:
        time.sleep(0.05)
    while _reap():
        _signal_descendants(signal.SIGKILL)
        time.sleep(0.05)
    return command.returncode or 0


def _begin() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _parent_is_done() -> bool:
    """Waits up to a fifth of a second; nothing is ever written, so readable means closed."""
    readable, _, _ = select.select([sys.stdin], [], [], 0.2)
    return bool(readable)


def _reap() -> bool:
    """Collects the children that have ended. Returns whether any are left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _signal_descendants(number: int) -> None:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
                # pid (name) state parent: the name may contain anything
                parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
    descendants = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in descendants} - descendants:
        descendants |= found
    for pid in descendants - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())

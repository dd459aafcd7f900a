"""The command line that starts a process in a sandbox."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from klear_megatron.errors import UserError

INSIDE = Path(__file__).parent / "inside"
_PROBE = Path(__file__).parent / "probe.py"
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")


@dataclass(frozen=True)
class Interpreter:
    """What a Python needs to see: its executable, its folders, and where it looks for modules.

    `names` has the origin of each name that programs may use without importing it.
    """

    executable: str
    folders: tuple[str, ...]
    search_path: tuple[str, ...]
    names: Mapping[str, str]


@functools.cache
def find_interpreter(python: Path | None) -> Interpreter:
    """What `python` needs to see; None is the interpreter that this environment was made from.

    Raises:
        UserError: it does not run.
    """
    executable = str(python or sys._base_executable)  # type: ignore[attr-defined]
    try:
        output = subprocess.check_output([executable, "-I", str(_PROBE)], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"rewards.code.python: {executable} does not run: {error}") from error
    known = json.loads(output)
    # A system's interpreter lives in /usr, beside everything else.
    home = known["executable"] if known["prefix"] == "/usr" else known["prefix"]
    search_path = tuple(known["search_path"])
    return Interpreter(known["executable"], (home, *search_path), search_path, known["names"])


def bubblewrap_command(interpreter: Interpreter, seccomp_fd: int) -> list[str]:
    """No network, no writable file, no host file but the interpreter and its libraries.

    Started by root, the first process keeps only the privileges to become another user and to end
    that user's processes, since the limit on processes does not hold for root. Started by anybody
    else, the sandbox gets a user namespace, which counts its processes by itself.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError(
            "rewards.code.sandbox: bubblewrap (bwrap) is not installed, and a model's programs are "
            "not run without it; install it (apt-get install bubblewrap, dnf install bubblewrap)"
            + UNSAFE_HINT
        )
    command = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    if os.getuid() == 0:
        command += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user", "--disable-userns"]
    for folder in _LIBRARIES:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += _show(folder)
    for path in ("/etc/ld.so.cache", *interpreter.folders):
        if os.path.exists(path):
            command += _show(path)
    command += ["--ro-bind", str(INSIDE), "/inside", "--dir", "/tmp", "--chdir", "/tmp"]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/"]
    return [
        *(*command, "--clearenv", "--setenv", "OPENBLAS_NUM_THREADS", "1"),
        *("--new-session", "--die-with-parent", "--as-pid-1", "--seccomp", str(seccomp_fd), "--"),
    ]


def _show(path: str) -> list[str]:
    options = []
    for parent in reversed(Path(path).parents[:-1]):  # which only its owner could enter, by default
        options += ["--perms", "0755", "--dir", str(parent)]
    return [*options, "--ro-bind", path, path]


UNSAFE_HINT = (
    ", or, where these programs may do whatever your user may, set rewards.code.sandbox to unsafe"
)

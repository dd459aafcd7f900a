"""Commands as a user would start them, and the quickstart's own data for them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command_line(*arguments: str, ranks: int | None = None) -> list[str]:
    """`klear-megatron ARGUMENTS`, with `ranks` as `klear-megatron torchrun` starts them."""
    command = [sys.executable, "-m", "klear_megatron"]
    if ranks is not None:
        command += ["torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    return [*command, *arguments]


def run_command(*arguments: str, ranks: int | None = None, timeout: float = 300) -> Any:
    """What `command_line` says, to its end."""
    return subprocess.run(
        command_line(*arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def kill_command(*arguments: str, path: Path, lines: int) -> None:
    """Starts `klear-megatron ARGUMENTS` and kills it once `path` has so many lines."""
    with subprocess.Popen(
        command_line(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, f"ended with {process.returncode} before {path.name}"
            assert time.monotonic() < deadline, f"{path} did not get {lines} lines"
            time.sleep(0.01)
        process.kill()


def prepare_quickstart(folder: Path) -> None:
    """Writes base/, sft.jsonl, train.jsonl and heldout.jsonl."""
    script = ROOT / "examples" / "quickstart" / "prepare.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=120)

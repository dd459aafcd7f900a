"""The command line; see the package."""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from tools import gpu_check
from tools.gpu_check.checks import CHECKS, Check
from tools.gpu_check.outcome import (
    FailedError,
    NotHereError,
    Outcome,
    read_report,
    write_report,
)

_LEAST_S = 20.0
"""No check begins with less time than this."""


def machine() -> dict[str, str]:
    """Versions and hardware, as the report names them."""
    from klear_megatron.doctor.gpu import version

    names = ("torch", "megatron-core", "transformer-engine", "nvidia-cudnn-cu13", "flash-attn")
    gpus = torch.cuda.device_count()
    return {
        "GPUs": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "none",
        "Python": platform.python_version(),
        **{name: found for name in names if (found := version(name))},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=gpu_check.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("gpu_check"))
    parser.add_argument("--minutes", type=float, default=60.0, help="for all checks together")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks whose names hold this")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # runs in this process
    options = parser.parse_args()
    if options.one:
        run_here(next(check for check in CHECKS if check.name == options.one), options.folder)
        return 0
    wanted = [c for c in CHECKS if not options.only or any(n in c.name for n in options.only)]
    options.folder.mkdir(parents=True, exist_ok=True)
    return run_all(wanted, options.folder, time.monotonic() + 60 * options.minutes)


def run_all(checks: list[Check], folder: Path, deadline: float) -> int:
    """Runs what has not passed before; returns the exit code."""
    here = machine()
    outcomes = read_report(folder, here)
    for check in checks:
        known = outcomes.get(check.name)
        if known is None or known.status not in ("passed", "not here"):
            outcomes[check.name] = run_apart(check, folder, deadline - time.monotonic())
            write_report(folder, here, outcomes)
        outcome = outcomes[check.name]
        print(f"{outcome.status:8} {check.name}: {outcome.text}", flush=True)
    print(f"{folder / 'report.md'}")
    return int(any(outcomes[check.name].status == "failed" for check in checks))


def run_apart(check: Check, folder: Path, seconds: float) -> Outcome:
    """Runs a check in processes of its own, for at most so long."""
    if 0 < torch.cuda.device_count() < check.gpus:
        return Outcome("not here", reason=f"needs {check.gpus} GPUs")
    if seconds < _LEAST_S:
        return Outcome("no time")
    name = re.sub(r"\W+", "_", check.name)
    result = folder / name / "outcome.json"
    shutil.rmtree(result.parent, ignore_errors=True)
    result.parent.mkdir()
    module = ["-m", "tools.gpu_check", "--folder", str(result.parent), "--one", check.name]
    if check.ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--no-python"]
        module = [*torchrun, f"--nproc-per-node={check.ranks}", sys.executable, *module]
    start = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *module],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
            died = f"ended with {process.returncode}; see {log}"
        except subprocess.TimeoutExpired:
            died = f"did not end within {seconds:.0f} s; see {log}"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - start
    if not result.is_file():
        return Outcome("failed", reason=died, seconds=took)
    outcome = Outcome(**{**json.loads(result.read_text()), "seconds": took})
    if outcome.status == "passed":
        shutil.rmtree(result.parent)  # models of gigabytes
    return outcome


def run_here(check: Check, folder: Path) -> None:
    """Runs a check in this process; the first rank leaves the outcome in the folder."""
    logging.disable_progress_bar()
    first = os.environ.get("RANK", "0") == "0"
    try:
        outcome = Outcome("passed", check.run(folder))
    except NotHereError as error:
        outcome = Outcome("not here", reason=str(error))
    except FailedError as error:
        outcome = Outcome("failed", error.numbers, str(error))
    except Exception as error:
        if not first:
            raise  # torchrun ends the first rank too, which might wait for this one
        traceback.print_exc()
        outcome = Outcome("failed", reason=f"{type(error).__name__}: {error}"[:300])
    if first:
        (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    sys.exit(main())

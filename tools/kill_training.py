"""Kills a run, or its servers, at random moments with SIGKILL, and counts the prompts at the end.

    .venv/bin/python tools/kill_training.py CONFIG [--kills N] [--servers | --one KIND]
        [--verb sft] [--section.key value ...]

The run is started again after each kill; with `--servers`, it has to go on by itself. With `--one`,
each kill is of one process only: torchrun, a rank, a server (any of its processes, and their
guards), a writer of a checkpoint, a process of a sandbox, or any other that a rank has started
(worker: it grades, or is the writers' queue). Nothing of the run may be left within a minute, or if
it goes on, nothing that is not in its tree of processes.

RL is then run to its end, and every prompt that was handed out must have been trained on, counted
as dropped, or be in the buffer of the last checkpoint, exactly once. `run_dir` must be empty, and
`save_every` 1.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
from safetensors import safe_open

from klear_megatron.config import load_config
from klear_megatron.data import PromptSampler
from klear_megatron.policy.checkpoint import latest_checkpoint, read_state
from klear_megatron.rl.config import RLConfig
from klear_megatron.sft.config import SFTConfig
from klear_megatron.training.config import RunConfig

_LONGEST_S = 6.0
"""From a step to the kill."""
_GRACE_S = 60.0
"""Until nothing may be left."""
_MARK = "KILL_TRAINING"
"""In the environment of all processes of the run."""
_KINDS = ("torchrun", "rank", "server", "writer", "sandbox", "worker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", action="store_true")
    parser.add_argument("--one", choices=_KINDS)
    parser.add_argument("--verb", choices=["rl", "sft"], default="rl")
    options, overrides = parser.parse_known_args()
    kind: type[RunConfig] = RLConfig if options.verb == "rl" else SFTConfig
    config = load_config(kind, options.config, overrides)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    trainer = [f"--nproc-per-node={options.ranks}", "-m", "klear_megatron", options.verb]
    command = [*torchrun, *trainer, str(options.config), *overrides]
    random.seed(options.seed)
    kill_some = kill_servers if options.servers else kill_trainer
    if options.one:
        kill_some = partial(kill_one, kind=options.one)
    process = None
    for number in range(1, options.kills + 1):
        process = running(process, command)
        wait_for_step(process, config.run_dir)
        time.sleep(random.uniform(0, _LONGEST_S))
        kill_some(process, config.run_dir)
        step = last_step(config.run_dir)
        print(f"kill {number} of {options.kills}: after step {step}", flush=True)
    if isinstance(config, RLConfig):
        process = running(process, command)
        if process.wait():
            sys.exit(f"the run ended with {process.returncode}")
        print(json.dumps(count_prompts(config), indent=2))
    elif process is not None and process.poll() is None:
        kill_trainer(process, config.run_dir)


def running(process: subprocess.Popen[bytes] | None, command: list[str]) -> subprocess.Popen[bytes]:
    """The run, started again if it has ended."""
    if process is not None and process.poll() is None:
        return process
    environment = os.environ | {_MARK: str(os.getpid())}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def wait_for_step(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Returns when the run has taken one more step."""
    before = last_step(run_dir)
    while last_step(run_dir) <= before:
        if process.poll() is not None:
            sys.exit("the run ended before it was killed; see above, or give it more steps")
        time.sleep(0.05)


def kill_trainer(process: subprocess.Popen[bytes], _: Path) -> None:
    """Kills all processes of the run but its servers, which have to end by themselves."""
    family = family_of(process)
    for one in family:
        if not is_server(one):
            kill(one)
    process.wait()
    expect_ended(family, process)


def kill_one(process: subprocess.Popen[bytes], run_dir: Path, kind: str) -> None:
    """Kills a process of this kind, once there is one. Returns when the run has ended, or has taken
    two more steps without it."""
    family = family_of(process)
    while not (victims := [one for one in family if kind_of(one, process.pid) == kind]):
        family = family_of(process)
    victim = random.choice(victims)
    words = " ".join(victim.cmdline()) if victim.is_running() else "it has ended by itself"
    print(f"killing {victim.pid}: ... {words[-70:]}", flush=True)
    kill(victim)
    before, begin = last_step(run_dir), time.monotonic()
    while process.poll() is None and last_step(run_dir) < before + 2:
        time.sleep(0.05)
    expect_ended(family, process)
    ended = "ended" if process.poll() is not None else "went on"
    print(f"the run {ended}, after {time.monotonic() - begin:.1f} s", flush=True)


def kind_of(process: psutil.Process, torchrun: int) -> str | None:
    """Its kind; None if it has ended."""
    with contextlib.suppress(psutil.Error):
        if process.pid == torchrun:
            return "torchrun"
        if process.ppid() == torchrun:
            return "rank"
        if is_server(process):
            return "server"
        command = process.cmdline()
        if "/inside/main.py" in command or any("bwrap" in word for word in command):
            return "sandbox"
        # Forks have their rank's command line.
        return "writer" if "klear_megatron" in command else "worker"
    return None


def expect_ended(family: list[psutil.Process], run: subprocess.Popen[bytes]) -> None:
    """Ends this tool if a process of the run is left that does not belong to what goes on of it."""
    deadline = time.monotonic() + _GRACE_S
    while left := [one for one in {*family, *marked()} if outlives(one, run)]:
        if time.monotonic() > deadline:
            sys.exit(f"processes outlived the run: {left}")
        time.sleep(0.2)


def outlives(process: psutil.Process, run: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(psutil.Error):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            ancestors = {process.pid, *(one.pid for one in process.parents())}
            return run.poll() is not None or run.pid not in ancestors
    return False


def marked() -> Iterator[psutil.Process]:
    """The processes of this tool's runs; those in a sandbox have another environment."""
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.environ().get(_MARK) == str(os.getpid()) and one.pid != os.getpid():
                yield one


def kill_servers(process: subprocess.Popen[bytes], _: Path) -> None:
    """Kills the servers; the run has to start them again."""
    for one in family_of(process):
        if is_server(one):
            kill(one)


def family_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    if process.poll() is not None:
        sys.exit("the run ended before it was killed; see above, or give it more steps")
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def is_server(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "sglang" in " ".join(process.cmdline())
    return False


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):  # it may have ended by itself
        process.kill()


def last_step(run_dir: Path) -> int:
    """Of the metrics; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0


def count_prompts(config: RLConfig) -> dict[str, int]:
    """How many prompts were trained on, were dropped, and are left in the buffer.

    Raises:
        AssertionError: a prompt is missing, or there twice.
    """
    trained, dropped = Counter[int](), Counter[int]()
    for dump in sorted((config.run_dir / "rollouts").glob("step_*.jsonl")):
        for index, advantages in groups(dump, config.responses_per_prompt):
            (trained if any(advantages) else dropped)[index] += 1
    checkpoint = latest_checkpoint(config.run_dir)
    assert checkpoint is not None
    left: Counter[int] = Counter()
    for path in (checkpoint / "buffer").glob("leader_*.safetensors"):
        with safe_open(path, "pt") as file:
            held = json.loads(file.metadata()["held"])
        left.update(slot["row"] for slot in held["slots"] + held["replaced"])
        left.update(held["rows"])
    state = read_state(checkpoint)["sampler"]
    sampler = PromptSampler(state["num_rows"], state["seed"])
    handed_out = Counter(sampler.next_batch(sum(state["drawn"].values())))
    assert trained + dropped + left == handed_out, "a prompt is missing, or there twice"
    counts = {"trained": trained, "dropped": dropped, "left in the buffer": left}
    return {name: prompts.total() for name, prompts in counts.items()}


def groups(dump: Path, size: int) -> Iterator[tuple[int, list[float]]]:
    """The prompt and the advantages of each group of a step."""
    rows = [json.loads(line) for line in dump.read_text().split("\n") if line]
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        assert len({row["index"] for row in group}) == 1
        assert len(group) == size
        yield group[0]["index"], [row["advantage"] for row in group]


if __name__ == "__main__":
    main()

"""Kills RL, or its servers, at random moments with SIGKILL, and counts the prompts at the end.

    .venv/bin/python tools/kill_training.py CONFIG [--kills N] [--servers | --one]
        [--section.key value ...]

The run is started again after each kill; with `--servers`, it has to go on by itself. With `--one`,
each kill is of one process only, of a kind that is drawn: torchrun, a rank, or a process that a
rank has started. If the run does not go on by itself, nothing of it may be left. Every prompt that
was handed out must have been trained on, counted as dropped, or be in the buffer of the last
checkpoint, exactly once. `run_dir` must be empty, and `save_every` 1.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from safetensors import safe_open

from klear_megatron.config import load_config
from klear_megatron.data import PromptSampler
from klear_megatron.policy.checkpoint import latest_checkpoint, read_state
from klear_megatron.rl.config import RLConfig

_LONGEST_S = 6.0
"""From a step to the kill."""
_ENDS_S = 120.0
"""Until a run has to have ended of which a rank or torchrun was killed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", action="store_true")
    parser.add_argument("--one", action="store_true")
    options, overrides = parser.parse_known_args()
    config = load_config(RLConfig, options.config, overrides)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    trainer = [f"--nproc-per-node={options.ranks}", "-m", "klear_megatron", "rl"]
    command = [*torchrun, *trainer, str(options.config), *overrides]
    random.seed(options.seed)
    kill_some = kill_servers if options.servers else kill_one if options.one else kill_trainer
    process = None
    for number in range(1, options.kills + 1):
        if process is None or process.poll() is not None:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for_step(process, config.run_dir)
        time.sleep(random.uniform(0, _LONGEST_S))
        kill_some(process, config.run_dir)
        step = last_step(config.run_dir)
        print(f"kill {number} of {options.kills}: after step {step}", flush=True)
    if process is None or process.poll() is not None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    if process.wait():
        sys.exit(f"the run ended with {process.returncode}")
    print(json.dumps(count_prompts(config), indent=2))


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
    expect_ended(family)


def kill_one(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Kills torchrun, a rank, or a process of a rank. Returns when the run has ended, or goes on
    without that process."""
    torchrun, *others = family = family_of(process)
    ranks = torchrun.children()
    started = [one for one in others if one not in ranks]
    kinds = {"torchrun": [torchrun], "a rank": ranks, "a process of a rank": started}
    kind = random.choice(sorted(kinds))
    victim = random.choice(kinds[kind])
    with contextlib.suppress(psutil.Error):
        print(f"killing {kind}: {' '.join(victim.cmdline())[-100:]}", flush=True)
    kill(victim)
    if kind == "a process of a rank":
        before = last_step(run_dir)
        while process.poll() is None:
            if last_step(run_dir) > before + 1:
                return
            time.sleep(0.05)
    process.wait(timeout=_ENDS_S)
    expect_ended(family)


def expect_ended(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=60)
    if alive:
        sys.exit(f"processes outlived the run: {alive}")


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

"""Kills RL at random moments with SIGKILL, goes on after each, and counts the prompts.

    .venv/bin/python tools/kill_training.py CONFIG [--kills N] [--ranks N] [--section.key value ...]

Every prompt that was handed out must have been trained on, counted as dropped, or be in the buffer
of the last checkpoint, exactly once. `run_dir` must be empty, and `save_every` 1.
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
"""From the first checkpoint of a start to its kill."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args()
    config = load_config(RLConfig, options.config, overrides)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    trainer = [f"--nproc-per-node={options.ranks}", "-m", "klear_megatron", "rl"]
    command = [*torchrun, *trainer, str(options.config), *overrides]
    random.seed(options.seed)
    for number in range(1, options.kills + 1):
        seconds = random.uniform(0, _LONGEST_S)
        step = start_and_kill(command, config.run_dir, seconds)
        print(f"kill {number} of {options.kills}: after step {step}", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(json.dumps(count_prompts(config), indent=2))


def start_and_kill(command: list[str], run_dir: Path, seconds: float) -> int:
    """Kills all processes of the run but its servers, so many seconds after the run's next step;
    the servers have to end by themselves.

    Returns:
        The run's last step.
    """
    before = last_step(run_dir)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while last_step(run_dir) == before:
            if process.poll() is not None:
                assert process.stderr is not None
                sys.exit(f"the run ended before it was killed:\n{process.stderr.read().decode()}")
            time.sleep(0.05)
        time.sleep(seconds)
        if process.poll() is not None:
            sys.exit("the run ended before it was killed; give it more steps")
        family = psutil.Process(process.pid).children(recursive=True)
        for one in [psutil.Process(process.pid), *family]:
            with contextlib.suppress(psutil.Error):  # it has ended by itself
                if "sglang" not in " ".join(one.cmdline()):
                    one.kill()
        _, alive = psutil.wait_procs(family, timeout=60)
        if alive:
            sys.exit(f"processes outlived the run: {alive}")
    return last_step(run_dir)


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
    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        assert len({row["index"] for row in group}) == 1
        assert len(group) == size
        yield group[0]["index"], [row["advantage"] for row in group]


if __name__ == "__main__":
    main()

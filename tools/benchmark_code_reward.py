"""Tests per second of the code reward, beside a plain loop that starts one bubblewrap per test.

    python tools/benchmark_code_reward.py [--programs 64] [--tests 16] [--rounds 3]

The programs are trivial, so that what is measured is the grading. The plain loop starts the same
interpreter, as `python program.py` and as fast as it can be started (`-I -S`); it gets as many
threads as the pool has processes in the last row. Each round runs all of them; medians are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from klear_megatron.rewards import Job, RewardConfig, RewardPool, code_reward
from klear_megatron.rewards.sandbox.bubblewrap import find_interpreter

PROGRAM = "print(sum(map(int, input().split())))"
RESPONSE = f"<think></think>\n```python\n{PROGRAM}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=64)
    parser.add_argument("--tests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    pairs = [(f"{i} {i + 1}", str(2 * i + 1)) for i in range(options.tests)]
    inputs, outputs = zip(*pairs, strict=True)
    ground_truth = json.dumps({"inputs": inputs, "outputs": outputs})
    all_tests = options.programs * options.tests

    with tempfile.TemporaryDirectory() as folder, RewardPool(RewardConfig()) as pool:
        program = Path(folder) / "program.py"
        program.write_text(PROGRAM)
        jobs = [Job("coder1_longcot", RESPONSE, ground_truth)] * options.programs
        pool.grade(jobs[:cores])

        def one_by_one(*flags: str, threads: int = 1) -> None:
            command = plain_command(program, *flags)
            with ThreadPoolExecutor(threads) as executor:
                # One test in eight: it is slow.
                list(
                    executor.map(
                        lambda pair: run_plainly(command, *pair),
                        pairs * (all_tests // 8 // options.tests),
                    )
                )

        def pooled() -> None:
            assert all(reward.correct for reward in pool.grade(jobs))

        def alone() -> None:
            for _ in range(options.programs // 4):
                assert code_reward(RESPONSE, ground_truth).correct

        ways: dict[str, tuple[Callable[[], None], int]] = {
            "one bubblewrap per test, python program.py": (one_by_one, all_tests // 8),
            "one bubblewrap per test, python -I -S program.py": (
                lambda: one_by_one("-I", "-S"), all_tests // 8
            ),
            f"the same in {cores} threads": (
                lambda: one_by_one("-I", "-S", threads=cores), all_tests // 8
            ),
            "code_reward, in one process": (alone, all_tests // 4),
            f"RewardPool, {cores} processes": (pooled, all_tests),
        }  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, (run, tests) in ways.items():
                start = time.perf_counter()
                run()
                rates[name].append(tests / (time.perf_counter() - start))

    print(f"{options.programs} programs of {options.tests} tests, {cores} cores, tests per second:")
    baseline = statistics.median(rates["one bubblewrap per test, python program.py"])
    for name, measured in rates.items():
        median = statistics.median(measured)
        spread = f"{min(measured):.0f} to {max(measured):.0f}"
        print(f"| {name} | {median:.0f} | {spread} | {median / baseline:.1f} |")


def plain_command(program: Path, *flags: str) -> list[str]:
    """What a plain sandbox does for each test: the host's libraries and interpreter, read-only."""
    interpreter = find_interpreter(None)
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--die-with-parent"]
    for path in ("/usr", "/lib", "/lib64", *interpreter.folders):
        command += ["--ro-bind-try", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", str(program), "/program.py"]
    return [*command, interpreter.executable, *flags, "/program.py"]


def run_plainly(command: list[str], stdin: str, expected: str) -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


if __name__ == "__main__":
    main()

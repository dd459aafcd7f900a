"""Make what the ablations train on: a base model, additions and small programs.

    python examples/ablations/prepare.py OUT_DIR

Writes, the same bytes each time and without touching the network:

    OUT_DIR/base/                 a random-weight Qwen3 of 0.2M parameters with the quickstart's
                                  tokenizer
    OUT_DIR/sft.jsonl             right solutions of additions and programs: the common SFT data
    OUT_DIR/math.jsonl            additions for reinforcement learning
    OUT_DIR/code.jsonl            programs for reinforcement learning; half of them have tests that
                                  come from a reference solution with a mistake
    OUT_DIR/teacher.jsonl         right solutions of programs, to train a teacher that finds those
    OUT_DIR/{easy,hard}_{right,mixed}.jsonl   a careless teacher's solutions, right ones or all
    OUT_DIR/top_{1,2,4}.jsonl     as many solutions of additions, from the best one, two or four of
                                  four sources; each has more mistakes than the one before it
    OUT_DIR/heldout_{easy,hard,code}.jsonl   problems for evaluation

An addition has 2 digits (easy) or 3 digits (hard). Its solution is worked digit by digit, as the
quickstart's is; a mistake in one digit is carried on to the answer. A program is a function of one
number with two to four cases, which the prompt describes in words; each case has tests.
"""

import argparse
import itertools
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from klear_megatron.config.imports import import_module

quickstart = import_module(str(Path(__file__).parents[1] / "quickstart" / "prepare.py"), "prepare")

EASY, HARD = 2, 3
"""Digits of the two numbers to add."""
CARELESS = 0.15
"""How often the careless teacher gets a digit wrong."""
SOURCES = [0.0, 0.1, 0.2, 0.4]
"""How often each source of worked additions gets a digit wrong, the best source first."""
FINE_TUNING = 2400
"""Rows of each data set that is fine-tuned on."""
WORDS = {"+": "add", "-": "subtract", "*": "multiply by"}
INPUTS = range(10)
"""What the tests of a program call it with."""

Row = dict[str, Any]


def is_held_out(problem: object) -> bool:
    """Whether a problem is for evaluation; a tenth of them are."""
    return zlib.crc32(repr(problem).encode()) % 10 == 0


def numbers(rng: random.Random, digits: int, *, held_out: bool = False) -> tuple[int, int]:
    """Two numbers of so many digits to add, for training or for evaluation."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        addends = rng.randint(low, high), rng.randint(low, high)
        if is_held_out(sorted(addends)) == held_out:
            return addends


def worked_addition(addends: tuple[int, int], rng: random.Random, mistakes: float) -> str:
    """A solution in which each digit of the sum is wrong with this probability."""
    carry, steps, total = 0, [], 0
    for place in range(len(str(addends[0]))):
        a, b = (number // 10**place % 10 for number in addends)
        digit_sum = a + b + carry
        if rng.random() < mistakes:
            digit_sum += rng.choice([-1, 1]) if digit_sum else 1
        steps.append(f"{a}+{b}+{carry}={digit_sum}")
        carry = digit_sum // 10
        total += digit_sum % 10 * 10**place
    answer = total + carry * 10 ** len(steps)
    return f"<think>{','.join(steps)}</think>\n\\boxed{{{answer}}}"


def conversation(question: str, answer: str) -> Row:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def additions(rng: random.Random, digits: list[int], mistakes: float = 0.0) -> Iterator[Row]:
    """Endless conversations about additions, with as many digits in turn, and whether the answer
    is right under the key `right`."""
    for count in itertools.cycle(digits):
        addends = numbers(rng, count)
        solution = worked_addition(addends, rng, mistakes)
        row = conversation(quickstart.question(addends), solution)
        yield {**row, "right": solution.endswith(f"{{{sum(addends)}}}")}


Program = list[tuple[int, str, int]]
"""The cases of a function of x: below which number it is, an operator, and a number."""


def random_program(rng: random.Random, *, held_out: bool = False) -> Program:
    """Two to four cases, each with tests of its own; for training or for evaluation."""
    while True:
        bounds = [*sorted(rng.sample(range(2, 9, 2), rng.randint(1, 3))), max(INPUTS) + 1]
        program = [(bound, rng.choice("+-*"), rng.randint(1, 9)) for bound in bounds]
        if is_held_out(program) == held_out:
            return program


def description(program: Program) -> str:
    *cases, last = [f"{WORDS[operator]} {number}" for _, operator, number in program]
    bounds = [bound for bound, _, _ in program]
    return ", ".join(
        [f"below {bound} {case}" for bound, case in zip(bounds, cases, strict=False)]
        + [f"else {last}"]
    )


def worked_program(program: Program) -> str:
    *cases, (_, operator, number) = program
    body = "".join(f"x{op}{value} if x<{bound} else " for bound, op, value in cases)
    source = f"f=lambda x:{body}x{operator}{number}"
    return f"<think>{len(program)} cases</think>\n```\n{source}\n```"


def result(program: Program, x: int) -> int:
    operator, number = next((op, value) for bound, op, value in program if x < bound)
    return {"+": x + number, "-": x - number, "*": x * number}[operator]


def with_a_mistake(program: Program, rng: random.Random) -> Program:
    """The program with another number in one of its cases."""
    wrong = rng.randrange(len(program))
    bound, operator, number = program[wrong]
    other = rng.choice([value for value in range(1, 10) if value != number])
    return [*program[:wrong], (bound, operator, other), *program[wrong + 1 :]]


def code_row(program: Program, reference: Program) -> Row:
    """The prompt of a program in Klear's format, with the results of `reference` as its tests."""
    tests = {
        "fn_name": "f",
        "inputs": [[x] for x in INPUTS],
        "outputs": [result(reference, x) for x in INPUTS],
    }
    return {
        "data_source": "coder1_longcot",
        "prompt": [{"role": "user", "content": description(program)}],
        "ability": "code",
        "reward_model": {"ground_truth": json.dumps(tests), "style": "rule"},
    }


def solved_programs(rng: random.Random) -> Iterator[Row]:
    while True:
        program = random_program(rng)
        yield conversation(description(program), worked_program(program))


def unsolved_programs(
    rng: random.Random, flawed: float = 0.0, *, held_out: bool = False
) -> Iterator[Row]:
    """Endless problems, of which this share has tests of a wrong reference solution."""
    while True:
        program = random_program(rng, held_out=held_out)
        is_flawed = rng.random() < flawed
        yield code_row(program, with_a_mistake(program, rng) if is_flawed else program)


def unsolved_additions(
    rng: random.Random, digits: list[int], *, held_out: bool = False
) -> Iterator[Row]:
    for count in itertools.cycle(digits):
        yield quickstart.klear_row(numbers(rng, count, held_out=held_out))


def data_sets(scale: float) -> dict[str, Iterator[Row]]:
    """The rows of each file, by its name.

    Args:
        scale: how many rows there are, relative to those of the full ablations.
    """

    def some(rows: Iterator[Row], count: int) -> Iterator[Row]:
        return itertools.islice(rows, round(count * scale))

    def seeded(name: str) -> random.Random:
        return random.Random(name)

    every = [EASY, HARD]
    solved = [*[additions(seeded("sft"), every)] * 3, solved_programs(seeded("sft programs"))]
    both = zip(*solved, strict=True)
    files = {
        "sft": some(itertools.chain.from_iterable(both), 8000),
        "math": some(unsolved_additions(seeded("math"), every), 4096),
        "code": some(unsolved_programs(seeded("code"), flawed=0.5), 192),
        "teacher": some(solved_programs(seeded("teacher")), 3200),
        "heldout_easy": some(unsolved_additions(seeded("heldout easy"), [EASY], held_out=True), 64),
        "heldout_hard": some(unsolved_additions(seeded("heldout hard"), [HARD], held_out=True), 64),
        "heldout_code": some(unsolved_programs(seeded("heldout code"), held_out=True), 64),
    }
    for count in (1, 2, 4):
        best = [additions(seeded(f"source {rate}"), every, rate) for rate in SOURCES[:count]]
        in_turn = itertools.chain.from_iterable(zip(*best, strict=True))
        files[f"top_{count}"] = some(in_turn, FINE_TUNING)
    for name, digits in (("easy", EASY), ("hard", HARD)):
        rows = list(some(additions(seeded(name), [digits], CARELESS), FINE_TUNING))
        files[f"{name}_mixed"] = iter(rows)
        files[f"{name}_right"] = iter([row for row in rows if row["right"]])
    return files


def main() -> None:
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows to write")
    arguments = parser.parse_args()
    out_dir: Path = arguments.out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in data_sets(arguments.scale).items():
        quickstart.write_jsonl(out_dir / f"{name}.jsonl", rows)
    tokenizer = quickstart.train_tokenizer(
        "```", " multiply by subtract add, else below", "f=lambda x: if else", " cases"
    )
    tokenizer.save_pretrained(out_dir / "base")
    model = quickstart.random_qwen3(tokenizer, seed=0, hidden_size=64, layers=3)
    model.save_pretrained(out_dir / "base")


if __name__ == "__main__":
    main()

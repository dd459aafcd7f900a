import subprocess
import sys
import time

import psutil
import pytest
from math_verify import parse, verify

from klear_megatron.rewards import MathRewardConfig, math_reward
from tests.rewards.hard_answers import HARD_ANSWERS, MATH_VERIFY_DIFFERS
from tests.rewards.test_pool import in_thread

ANSWERS = [
    # ground truth, what follows </think>, right?
    ("579", r"\boxed{579}", True),
    ("579", r"The sum is $\boxed{579}$.", True),
    ("579", r"\boxed{578}", False),
    ("579", r"\boxed{-579}", False),
    ("1/2", r"\boxed{\frac{1}{2}}", True),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    (r"\frac12", r"\boxed{\frac{2}{4}}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{1}}", False),
    ("1,234", r"\boxed{1234}", True),
    ("1234", r"\boxed{1,234}", True),
    ("1234", r"\boxed{1{,}234}", True),
    ("1234", r"\boxed{1,235}", False),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", True),
    (r"2\sqrt{2}", r"\boxed{2}", False),
    (r"\pi", r"\boxed{π}", True),
    ("50%", r"\boxed{0.5}", True),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", True),
    ("[1, 2]", r"\boxed{(1, 2)}", False),
    ("C", r"\boxed{C}", True),
    ("C", r"\boxed{D}", False),
    ("$4$", r"\boxed{4}", True),
    (r"\boxed{4}", r"\boxed{4}", True),
    ("4", "The answer is 4", True),
    ("4", r"\boxed{4}}", True),
    ("4", r"\boxed{4", False),
    ("4", r"\boxed{}", False),
    ("4", r"\boxed{3} and \boxed{4}", False),
    ("4", "", False),
    ("4", "四", False),
    ("4", r"\boxed{\text{four}}", False),
    (["4", "5"], r"\boxed{5}", True),
    (["4", "5"], r"\boxed{6}", False),
]


@pytest.mark.parametrize(("ground_truth", "answer", "right"), ANSWERS)
def test_answer_after_the_think_block_decides(ground_truth, answer, right):
    reward = math_reward(f"<think>Perhaps it is 17.</think>\n{answer}", ground_truth)
    assert reward.correct is right
    assert reward.formatted
    assert reward.score == (1.0 if right else -1.0)
    assert not reward.timed_out


@pytest.mark.parametrize(
    ("response", "correct", "formatted"),
    [
        (r"<think>2+2</think>\boxed{4}", True, True),
        ("\n<think>\n2 < 3\n</think>\n\n" + r"\boxed{4}", True, True),
        (r"<think></think>\boxed{4}", True, True),
        (r"\boxed{4}", False, False),  # no think block: nothing follows </think>
        (r"<think>\boxed{4}", False, False),  # never closed: the answer was not given
        (r"2+2</think>\boxed{4}", True, False),
        (r"Well, <think>2+2</think>\boxed{4}", True, False),
        (r"<think>2</think>\boxed{5}<think>+2</think>\boxed{4}", True, False),
        (r"<think>2</think>\boxed{4}<think>+2</think>\boxed{5}", False, False),
        (r"<think><think>2+2</think></think>\boxed{4}", True, False),
        (r"<think>2+2</think>\boxed{4}</think>", False, False),
        (r"</think>\boxed{4}<think>", True, False),
        ("", False, False),
    ],
)
def test_format_is_judged_apart_from_the_answer(response, correct, formatted):
    config = MathRewardConfig(correct=2.0, wrong=-3.0, format_penalty=0.25)
    reward = math_reward(response, "4", config)
    assert (reward.correct, reward.formatted) == (correct, formatted)
    assert reward.score == (2.0 if correct else -3.0) - (0.0 if formatted else 0.25)


@pytest.mark.parametrize(("ground_truth", "answer", "right"), HARD_ANSWERS)
def test_hard_answers_are_judged_as_by_hand_and_as_by_math_verify(ground_truth, answer, right):
    verdict = math_reward(f"<think></think>{answer}", ground_truth).correct
    assert verdict is (right ^ ((ground_truth, answer) in MATH_VERIFY_DIFFERS))
    golds = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    parsed = parse(answer, parsing_timeout=None)
    assert verdict is any(
        verify(parse(rf"\boxed{{{gold}}}", parsing_timeout=None), parsed, timeout_seconds=None)
        for gold in golds
    )


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{\mathrm{e}}{2}", r"\boxed{\frac{\mathrm{e}}{3}}", False),
        (r"\frac{\mathrm{e}}{2}", r"\boxed{\dfrac{ \mathrm{e} }{2}}", True),
        (r"\frac{\mathrm{e}}{2}", r"It is $\frac{\mathrm{e}}{2}$. So: $\boxed{\frac{e}{2}}$", True),
        (
            r"\frac{\mathrm{e}}{2}",
            r"\boxed{\frac{\mathrm{e}}{2}} \boxed{\frac{\mathrm{e}}{3}}",
            False,
        ),
        (r"\frac{\mathrm{e}}{2}", r"\boxed{\frac{\mathrm{e}}{3}}, and 5", False),
        (r"\frac{\mathrm{e}}{2}", r"\boxed{\frac{", False),
        (r"\operatorname{Re}(z)", r"\boxed{\operatorname{Re} \left(z\right)}", True),
        (r"\operatorname{Re}(z)", r"\boxed{\operatorname{Im}(z)}", False),
    ],
)
def test_answers_that_are_read_as_text_only_have_to_be_the_same_text(gold, answer, right):
    assert math_reward(f"<think></think>{answer}", gold).correct is right


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda function: function(), r"\boxed{10^{10^{10^{10}}}}"),
        (in_thread, r"\boxed{10^{10^{10^{10}}}}"),
        (in_thread, r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}"),
    ],
    ids=["main thread", "thread", "parsing"],
)
def test_plain_function_does_not_hang(call, answer):
    config = MathRewardConfig(cpu_limit_s=1)
    reward = call(lambda: math_reward(f"<think></think>{answer}", "4", config))
    assert reward.timed_out
    assert not reward.correct
    assert call(lambda: math_reward(r"<think></think>\boxed{4}", "4")).correct


def test_plain_function_works_in_any_script_and_leaves_no_process(tmp_path):
    script = tmp_path / "script.py"  # without a guard, which new processes of other kinds need
    script.write_text(
        "import psutil\nfrom klear_megatron.rewards import math_reward\n"
        "print(math_reward('<think></think>4', '4').correct)\n"
        "print(*[child.pid for child in psutil.Process().children()])\n"
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    correct, verifier = said.stdout.split()
    assert correct == "True"
    gone = time.monotonic() + 20
    while psutil.pid_exists(int(verifier)):
        assert time.monotonic() < gone
        time.sleep(0.05)


def test_there_are_enough_hard_answers_and_each_exception_is_one_of_them():
    cases = {(str(ground_truth), answer) for ground_truth, answer, _ in HARD_ANSWERS}
    assert len(cases) >= 200
    assert set(MATH_VERIFY_DIFFERS) <= cases


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("word " * 500_000 + r"\boxed{4}", True),
        (r"\boxed{4}" + " word" * 500_000, True),
        ("\n" * 2_000_000 + r"\boxed{4}", True),
        ("12 " * 300_000 + r"\boxed{4}", True),
        ("{" * 300_000 + r"\boxed{4}", True),
        (r"\boxed{" * 10_000, False),
        (r"\boxed{" + "1" * 100_000 + "}", False),
    ],
    ids=lambda value: str(value)[:12],
)
def test_megabytes_of_text_are_judged_like_little_text(answer, right):
    assert math_reward(f"<think></think>{answer}", "4").correct is right

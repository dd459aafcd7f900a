"""Is the final answer of a response right?"""

import logging
from collections.abc import Sequence

from math_verify import parse, verify

from klear_megatron.rewards.config import MathRewardConfig
from klear_megatron.rewards.reward import Reward, answer_of, is_formatted, score_with_format

# math-verify warns once per process that its own time limits are off. They are off on purpose: they
# are signals to the main thread, and cannot interrupt a long integer operation. RewardPool's can.
for _module in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_module).setLevel(logging.ERROR)


def math_reward(
    response: str,
    ground_truth: str | Sequence[str],
    config: MathRewardConfig = MathRewardConfig(),
) -> Reward:
    r"""Grade a response by math-verify's verdict on what follows its last `</think>`.

    A response without `</think>` has no answer, however right its reasoning. Where the answer has
    several `\boxed{}`, math-verify takes them together as a set; where it has none, it takes the
    last expression of the text. With several ground truths, one that agrees is enough.

    Here nothing limits the time, and an answer such as `\boxed{9^{9^{9}}}` takes for ever: grade a
    model's responses with RewardPool, which applies `config.timeout_s`.
    """
    correct = _agrees(answer_of(response), ground_truth)
    return score_answer(response, config, correct=correct)


def score_answer(
    response: str, config: MathRewardConfig, *, correct: bool, timed_out: bool = False
) -> Reward:
    """The reward of a response whose answer has been judged."""
    return Reward(
        score=score_with_format(config.correct if correct else config.wrong, response, config),
        correct=correct,
        formatted=is_formatted(response),
        timed_out=timed_out,
    )


def _agrees(answer: str, ground_truth: str | Sequence[str]) -> bool:
    golds = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    parsed_answer = parse(answer, parsing_timeout=None)
    # Boxed, a ground truth is read as the LaTeX it is: bare, "2\sqrt{2}" would be read as 2.
    return any(
        verify(
            parse(f"\\boxed{{{gold}}}", parsing_timeout=None), parsed_answer, timeout_seconds=None
        )
        for gold in golds
    )

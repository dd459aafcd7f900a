"""What mathematical answer does a response give, and is it the right one?

Nothing here limits the time, and an answer such as `10^{10^{10^{10}}}` takes for ever: `RewardPool`
and `math_reward` call these functions in processes of their own.
"""

import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from klear_megatron.rewards.reward import answer_of

# math-verify warns once per process that its own time limits are off. They are off on purpose: they
# are signals to the main thread, and cannot interrupt a long integer operation.
for _module in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_module).setLevel(logging.ERROR)


def agrees(answer: str, ground_truth: str | Sequence[str]) -> bool:
    """Whether the answer is, for math-verify, one of the ground truths.

    Where math-verify cannot read one of the two as an expression, it compares what it has read of
    the text, which may be no more than `\\frac{`. Then all of the text has to be the same instead.
    """
    golds = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    parsed_answer = parse(answer, parsing_timeout=None)
    return any(_agrees_with(gold, answer, parsed_answer) for gold in golds)


def math_answer(response: str) -> str | None:
    """What math-verify reads after the last `</think>`, in one way of writing it; None without."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # an answer may be a number of any length
    try:
        parsed = parse(answer_of(response), parsing_timeout=None)
        return str(parsed[0]) if parsed else None
    except RecursionError:  # nested too deep to be written
        return None
    finally:
        sys.set_int_max_str_digits(limit)


def _agrees_with(gold: str, answer: str, parsed_answer: list[Any]) -> bool:
    # Boxed, a ground truth is read as the LaTeX it is: bare, "2\sqrt{2}" would be read as 2.
    parsed_gold = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if _only_text(parsed_gold) or _only_text(parsed_answer):
        return _normalized(gold) == _normalized(_last_box(answer))
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None))


def _only_text(parsed: list[Any]) -> bool:
    return all(isinstance(item, str) for item in parsed)


def _last_box(answer: str) -> str:
    """The content of the last `\\boxed{}`, or the whole answer if there is none."""
    _, box, rest = answer.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:end] if box else answer
    return answer


_MEANINGLESS = re.compile(r"\s|\$|\\[,;:! ]|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle")
_FONTS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mathit|operatorname)\{([^{}]*)\}")


def _normalized(latex: str) -> str:
    """Without what does not change the meaning: spaces, dollars, fonts and sizes."""
    return _FONTS.sub(r"\1", _MEANINGLESS.sub("", latex)).replace("\\dfrac", "\\frac").rstrip(".")

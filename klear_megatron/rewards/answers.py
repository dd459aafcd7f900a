"""What answer does a response give? For votes among the responses to a problem."""

import sys

from math_verify import parse

from klear_megatron.rewards.reward import answer_of


def math_answer(response: str) -> str | None:
    """What math-verify reads after the last `</think>`, in one way of writing it; None without.

    Here nothing limits the time; RewardPool.read_answers does.
    """
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # an answer may be a number of any length
    try:
        parsed = parse(answer_of(response), parsing_timeout=None)
        return str(parsed[0]) if parsed else None
    except RecursionError:  # nested too deep to be written
        return None
    finally:
        sys.set_int_max_str_digits(limit)

"""What answer does a response give? For votes among the responses to a problem."""

import multiprocessing
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future

from math_verify import parse
from pebble import ProcessExpired, ProcessPool

from klear_megatron.rewards.config import RewardConfig
from klear_megatron.rewards.reward import answer_of


def math_answers(responses: Sequence[str], config: RewardConfig) -> list[str | None]:
    """What math-verify reads in each response after its last `</think>`, in one way of writing it.

    None where there is nothing to read, or where reading it takes longer than
    `config.math.timeout_s`. It runs in processes of its own, `config.workers` at a time.
    """
    with ProcessPool(
        max_workers=min(config.workers, len(responses)),
        initializer=_prepare_worker,
        context=multiprocessing.get_context("spawn"),
    ) as pool:
        futures = [
            pool.schedule(_math_answer, args=(response, config.math.timeout_s))
            for response in responses
        ]
        return [_result(future) for future in futures]


def _result(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except ProcessExpired:
        return None


def _prepare_worker() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.set_int_max_str_digits(0)  # an answer may be a number of any length
    parse("\\boxed{1}", parsing_timeout=None)  # imports the rest of sympy


def _math_answer(response: str, limit_s: float) -> str | None:
    # As for rewards: only the kernel can be relied on to end a long integer operation.
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        parsed = parse(answer_of(response), parsing_timeout=None)
        return str(parsed[0]) if parsed else None
    except RecursionError:  # nested too deep to be written
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

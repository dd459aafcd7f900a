"""Whether the final answer of a response is right."""

from collections.abc import Sequence

from klear_megatron.rewards.config import MathRewardConfig
from klear_megatron.rewards.reward import Reward, answer_of, is_formatted, score_with_format
from klear_megatron.rewards.verifier import Verifier

_verifier = Verifier()


def math_reward(
    response: str,
    ground_truth: str | Sequence[str],
    config: MathRewardConfig = MathRewardConfig(),
) -> Reward:
    r"""Grade a response by math-verify's verdict on what follows its last `</think>`.

    A response without `</think>` has no answer, however right its reasoning. Where the answer has
    several `\boxed{}`, math-verify takes them together as a set; where it has none, it takes the
    last expression of the text. With several ground truths, one that agrees is enough.

    The comparison runs in a process of its own, one call at a time, within the config's limits.
    To grade many responses at once, use RewardPool.
    """
    correct = _verifier.agrees(answer_of(response), ground_truth, config.limits)
    return score_answer(response, config, correct=bool(correct), timed_out=correct is None)


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

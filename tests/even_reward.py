"""A reward for models that are right by chance only."""

from klear_megatron.rewards import Reward


def even(response: str, ground_truth: str, data_source: str) -> Reward:
    """About half of what a random model says is right."""
    correct = len(response) % 2 == 0
    return Reward(score=float(correct), correct=correct, formatted=True)

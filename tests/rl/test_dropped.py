"""A run in which every group is dropped says so, and ends."""

from pathlib import Path
from typing import Any, cast

import pytest

from klear_megatron.errors import UserError
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.dropped import DroppedSteps
from klear_megatron.rl.rollouts import Rollouts


def rollouts(groups: int, accuracy: float = 0.0, truncated: float = 0.0) -> Rollouts:
    metrics = {"reward/accuracy": accuracy, "response/truncated": truncated}
    return Rollouts(cast(Batch, None), groups, metrics, [], slice(0, 0), [])


def test_the_first_such_step_is_a_warning_and_the_fifth_in_a_row_the_end(capsys: Any) -> None:
    dropped = DroppedSteps(Path("run"), main=True)
    for step, groups in enumerate((0, 0, 0, 0, 1, 0, 0, 0, 0), start=1):
        dropped.observe(step, rollouts(groups))
    said = capsys.readouterr().out
    assert said.count("warning: ") == 2
    assert "warning: step 6 trains on nothing" in said
    with pytest.raises(UserError, match=r"step 10: .* 5 steps in a row.*run/rollouts/step_0*10_0"):
        dropped.observe(10, rollouts(0))


@pytest.mark.parametrize(
    ("accuracy", "truncated", "advice"),
    [
        (0.0, 0.2, "too hard for this model, or its right answers are not recognised"),
        (1.0, 0.0, "too easy"),
        (0.0, 0.9, "raise sampling.max_response_length"),
        (0.5, 0.0, "draw more responses_per_prompt"),
    ],
)
def test_it_says_what_to_look_at(
    accuracy: float, truncated: float, advice: str, capsys: Any
) -> None:
    DroppedSteps(Path("run"), main=True).observe(1, rollouts(0, accuracy, truncated))
    assert advice in capsys.readouterr().out

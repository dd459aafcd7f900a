"""Steps that train on nothing, because every group was dropped."""

from pathlib import Path

from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.rl.rollouts import Rollouts

_MOST_IN_A_ROW = 5


class DroppedSteps:
    """Warns at the first step whose groups are all dropped, and ends the run after several in a
    row: it generates, learns nothing, and would look like one that works."""

    def __init__(self, run_dir: Path, *, main: bool) -> None:
        self._run_dir = run_dir
        self._main = main
        self._in_a_row = 0

    def observe(self, step: int, rollouts: Rollouts) -> None:
        """
        Raises:
            UserError: nothing was trained on in too many steps in a row. Every rank raises it.
        """
        if rollouts.groups:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        why = _explain(rollouts.metrics)
        where = f"read {self._run_dir}/rollouts/step_{step:08}_0.jsonl"
        if self._in_a_row == _MOST_IN_A_ROW:
            raise UserError(
                f"step {step}: nothing was trained on in {_MOST_IN_A_ROW} steps in a row; the "
                f"responses of each prompt all had the same reward. {why}; {where}"
            )
        if self._in_a_row == 1 and self._main:
            say(
                f"warning: step {step} trains on nothing: the responses of each prompt all had the "
                f"same reward. {why}; {where}. The run ends after {_MOST_IN_A_ROW} such steps in a "
                "row"
            )


def _explain(metrics: dict[str, float]) -> str:
    accuracy, truncated = metrics["reward/accuracy"], metrics["response/truncated"]
    numbers = f"{accuracy:.0%} are correct and {truncated:.0%} were cut off at the length limit"
    if accuracy == 1:
        return f"{numbers}: the prompts are too easy for this model"
    if truncated > 0.5:
        return f"{numbers}: raise sampling.max_response_length, or choose shorter problems"
    if accuracy == 0:
        return (
            f"{numbers}: the prompts are too hard for this model, or its right answers are not "
            "recognised, for their form or for a wrong ground truth"
        )
    return f"{numbers}: draw more responses_per_prompt, or prompts of medium difficulty"

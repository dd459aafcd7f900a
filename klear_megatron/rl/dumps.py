"""What each step's responses were, on the disk: their texts, and token by token."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klear_megatron.evaluation.responses import response_row
from klear_megatron.losses import Sequences, trained_tokens
from klear_megatron.observability import RolloutFiles
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group

_DECIMALS = 6
"""Of log-probabilities, which are off by more than that in float32 already."""


class Dumps:
    """Writes the groups of one leader.

    Args:
        leader: its number; None on a rank that does not lead and writes nothing.
    """

    def __init__(self, config: RLConfig, leader: int | None) -> None:
        self._config = config
        self._leader = leader
        self._files = RolloutFiles(config.run_dir)

    def write_texts(self, step: int, made: Sequence[Group]) -> None:
        """All groups, trained on or not, before anything is trained."""
        if self._leader is not None:
            self._files.write_texts(step, self._leader, _text_rows(made))

    def write_tokens(self, step: int, made: Sequence[Group], batch: Batch, own: slice) -> None:
        """The same groups with the trainer's log-probabilities before the first update, and with
        what was clipped in training; removes what is too old.

        Args:
            batch: what is trained on; has `old_log_probs` unless it is empty, and `clipped` once it
                has been trained on.
            own: the place of these groups' responses in it.
        """
        if self._leader is None or not (kept := self._config.token_dumps):
            return
        self._files.write_tokens(step, self._leader, self._token_rows(made, batch, own))
        self._files.forget_tokens(before=step - kept + 1)

    def _token_rows(
        self, made: Sequence[Group], batch: Batch, own: slice
    ) -> Iterator[dict[str, Any]]:
        trained = iter(self._trained(batch.select(range(len(batch.lengths))[own])))
        for group in made:
            start = len(group.prompt_ids)
            for response in group.responses:
                row = next(trained, None) if group.informative else None
                yield {
                    "prompt_ids": group.prompt_ids,
                    "token_ids": response.token_ids,
                    "rollout_log_probs": _rounded(torch.tensor(response.log_probs)),
                    "old_log_probs": None if row is None else _rounded(row.old[start:]),
                    "mask": None if row is None else row.mask[start:].int().tolist(),
                    "clipped": None if row is None else row.clipped[start:].int().tolist(),
                }

    def _trained(self, batch: Batch) -> Iterator["_Row"]:
        if not batch.lengths:
            return iter(())
        fields = batch.fields
        mask = trained_tokens(fields, Sequences.whole(batch.lengths), self._config.loss)
        clipped = fields["clipped"] if "clipped" in fields else torch.zeros_like(mask)
        columns = (fields["old_log_probs"], mask, clipped)
        return map(_Row, *(column.split(batch.lengths) for column in columns))


class _Row(NamedTuple):
    """A sequence that is trained on, with a value for each token; prompts have values, too."""

    old: Tensor
    mask: Tensor
    clipped: Tensor


def _text_rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    for group in groups:
        for text, response, reward, advantage in zip(
            group.texts, group.responses, group.rewards, group.advantages, strict=True
        ):
            yield response_row(group.prompt, text, response, reward, advantage=advantage)


def _rounded(log_probs: Tensor) -> list[float | None]:
    """JSON has no number for NaN and infinities."""
    values = log_probs.double().round(decimals=_DECIMALS)
    return [value if math.isfinite(value) else None for value in values.tolist()]

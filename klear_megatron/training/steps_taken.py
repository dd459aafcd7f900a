"""Optimizer steps that are not taken, because gradients are not finite."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.policy.batch import Batch

_IN_A_ROW = 3
"""One may be bad luck, such as an overflow. After so many the weights are to blame, the data or the
loss."""


class StepsTaken:
    """Watches the optimizer steps of a run. A mini-batch without one is kept in `not_finite/`."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "not_finite"
        self._in_a_row = 0

    def __call__(self, step: int, batch: Batch, metrics: Mapping[str, float]) -> bool:
        """Whether `Learner.train_step` took a step. Every rank has the same metrics.

        Raises:
            UserError: it has not for several mini-batches in a row.
        """
        if math.isfinite(metrics["grad_norm"]):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        path = self._folder / f"step_{step:08}_{self._in_a_row}.npz"
        if dist.get_rank() == 0:
            _write(path, batch)
            say(
                f"step {step}: gradient norm {metrics['grad_norm']}, loss {metrics['loss']}: no "
                f"optimizer step was taken on this mini-batch; {path} has it"
            )
        if self._in_a_row == _IN_A_ROW:
            raise UserError(
                f"step {step}: gradients of {_IN_A_ROW} mini-batches in a row are not finite, and "
                f"no optimizer step was taken on them. {path} has the last one: its tokens, and "
                f"every field of the loss. If all fields are finite, {_suspect(metrics)}"
            )
        return False


def _suspect(metrics: Mapping[str, float]) -> str:
    if math.isfinite(metrics["entropy"]) and not math.isfinite(metrics["loss"]):
        return f"the loss is to blame: it is {metrics['loss']}, and the model's entropy is finite"
    return "the weights are to blame: go on from an earlier checkpoint, with a lower learning rate"


def _write(path: Path, batch: Batch) -> None:
    """[N] tokens and fields of all sequences one after another, and [B] their lengths."""
    path.parent.mkdir(exist_ok=True)
    fields: dict[str, Any] = {name: values.numpy() for name, values in batch.fields.items()}
    np.savez_compressed(
        path, tokens=batch.tokens.numpy(), lengths=np.array(batch.lengths), **fields
    )

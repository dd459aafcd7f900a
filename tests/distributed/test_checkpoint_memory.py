"""Saving and loading a checkpoint takes no more memory than a rank's own part of the state."""

from pathlib import Path

import pytest

from klear_megatron.losses import SFTObjective
from tests.allocations import peak_allocation
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.distributed.reference import make_batch


def _save_and_load(model: Path, path: Path) -> tuple[int, int, int, int]:
    learner = make_learner(model, dtype="bfloat16")
    learner.train_step(make_batch([9, 30], [True] * 2, 0), SFTObjective())
    parameters = sum(p.numel() for chunk in learner.model.chunks for p in chunk.parameters())
    largest = max(p.numel() for chunk in learner.model.chunks for p in chunk.parameters())
    saving = peak_allocation(learner.save, path, {"step": 1})
    return parameters, largest, saving, peak_allocation(learner.load, path)


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
def test_a_rank_needs_memory_for_its_own_part(data_parallel, folder, tmp_path):
    ranks = run_ranks(data_parallel, _save_and_load, folder / "untied", tmp_path / "checkpoint")
    for parameters, largest, saving, loading in ranks:
        weights, optimizer = 2 * parameters, 12 * parameters // data_parallel
        one_tensor = 3 * 4 * largest  # what is read at a time, and how uneven the division may be
        assert saving <= weights // data_parallel + optimizer + one_tensor
        # Weights that another rank has read arrive in a buffer; gate and up are put together.
        assert loading <= 2 * weights + one_tensor

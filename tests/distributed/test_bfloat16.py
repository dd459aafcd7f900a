"""Training in bfloat16 gives float32's gradients up to rounding, in every kind of layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import comparison, laboratory, reference
from tests.distributed.comparison import MODELS
from tests.distributed.ranks import run_ranks
from tests.distributed.test_mutations import norms_not_reduced_over_tensor_parallel_ranks
from tests.models import tiny

OBJECTIVES = {name: comparison.OBJECTIVES[name] for name in ("sft", "gppo")}
"""Without bounds on a token's own log-ratio, on whose other side rounding might put it."""
LAYERS = MODELS["untied"].num_hidden_layers
ROUNDINGS = LAYERS * 2 * 16
"""How often a number is rounded to bfloat16 on its way: about 16 times per layer and direction, in
two norms, those of queries and keys, their rotation, five matrix products, the steps of attention
and activation, and two residual sums."""
BOUND = math.sqrt(ROUNDINGS) * 2**-8
"""Relative error of a gradient, 4.4 %. bfloat16 has 8 significant bits, so one rounding changes a
number by a factor of 2^-8 at most; independent errors add up as the square root of their number."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are bfloat16 numbers, so both precisions start from the same."""
    folder = tmp_path_factory.mktemp("bfloat16") / "qwen3"
    return tiny.write(folder, MODELS["untied"], dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, reference.Step]:
    """Hugging Face's first step in float32, for each objective."""
    return {
        name: reference.train(checkpoint, reference.BATCHES[:1], name)[0] for name in OBJECTIVES
    }


def _first_steps(checkpoint: Path, parallel: dict[str, int]) -> Any:
    return {
        name: laboratory.train(
            laboratory.make_learner(checkpoint, dtype="bfloat16", parallel=parallel),
            reference.BATCHES[:1],
            objective,
        )[0]
        for name, objective in OBJECTIVES.items()
    }


def _errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """By name, the norm of the difference relative to the norm of the right gradient."""
    assert ours.keys() == theirs.keys()
    return {n: ((ours[n] - t).norm() / t.norm()).item() for n, t in theirs.items()}


TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {}),
        (2, TP2),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
    ],
    ids=["one", "dp2", "tp2", "pp2", "cp2"],
)
def test_gradients_are_float32s_up_to_rounding(world_size, parallel, checkpoint, expected):
    ranks = run_ranks(world_size, _first_steps, checkpoint, parallel)
    for name, step in expected.items():
        for metrics, _ in (rank[name] for rank in ranks):
            assert metrics["loss"] == pytest.approx(step.loss, rel=BOUND)
            assert metrics["grad_norm"] == pytest.approx(step.grad_norm, rel=BOUND)
        _, gradients = ranks[0][name]
        assert {tensor.dtype for tensor in gradients.values()} == {torch.float32}
        errors = _errors(gradients, step.gradients)
        assert max(errors.values()) < BOUND, errors


def _broken(checkpoint: Path, parallel: dict[str, int]) -> Any:
    norms_not_reduced_over_tensor_parallel_ranks()
    return _first_steps(checkpoint, parallel)


def test_the_bound_would_catch_a_missing_reduction(checkpoint, expected):
    broken, _ = run_ranks(2, _broken, checkpoint, TP2)
    for name, step in expected.items():
        _, gradients = broken[name]
        assert max(_errors(gradients, step.gradients).values()) > BOUND

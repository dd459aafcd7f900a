"""A layout's three training steps against the reference's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.losses import (
    GMPOConfig,
    GPPOConfig,
    KLConfig,
    Objective,
    PolicyObjective,
    SFTObjective,
)
from tests.distributed import laboratory, reference
from tests.models import tiny
from tests.planning.held import held_state, planned_state

TOLERANCE = 1e-5

OBJECTIVES: dict[str, Objective] = {
    "sft": SFTObjective(),
    "gppo": PolicyObjective(GPPOConfig(dual_clip=None, sft_alpha=reference.ALPHA)),
    "sequence_wide": PolicyObjective(
        GMPOConfig(
            clip_low=reference.LOG_CLIP,
            clip_high=reference.LOG_CLIP,
            token_mask=reference.TOKEN_MASK,
            sequence_mask=reference.SEQUENCE_MASK,
            # No weights, with which the paper's value and gradient would not belong together.
            tis_floor=1,
            tis_clip=1,
            entropy_coeff=reference.ENTROPY_COEFF,
            kl=KLConfig(coeff=reference.KL_COEFF, estimator="k2"),
            sft_alpha=reference.ALPHA,
        )
    ),
}
MODELS = {
    "untied": tiny.qwen3(),
    "tied": tiny.qwen3(tie_word_embeddings=True),
    "deep": tiny.qwen3(num_hidden_layers=6, tie_word_embeddings=True),
    "moe": tiny.qwen3_moe(),
}
DENSE = [("untied", "sft"), ("untied", "sequence_wide"), ("tied", "gppo")]
DEEP = [("deep", "gppo")]
MOE = [("moe", "gppo")]


def write_references(folder: Path) -> None:
    """On one rank: how Hugging Face trains, and the metrics of one of our ranks."""
    for model, objective in DENSE + DEEP + MOE:
        if not (folder / model).exists():
            tiny.write(folder / model, MODELS[model])
        steps = reference.train(folder / model, reference.BATCHES, objective)
        metrics = [metrics for metrics, _ in _train(folder, model, objective, {})[0]]
        torch.save((steps, metrics), folder / f"{model}-{objective}.pt")


def _train(folder: Path, model: str, objective: str, settings: dict[str, Any]) -> Any:
    learner = laboratory.make_learner(folder / model, optimizer=reference.OPTIMIZER, **settings)
    steps = laboratory.train(learner, reference.BATCHES, OBJECTIVES[objective])
    buckets = laboratory.SMALL_BUCKET if learner.config.parallel.overlap_grad_reduce else None
    held, planned = held_state(learner), planned_state(learner, buckets)
    assert planned == held, f"bytes of weights, gradients, optimizer: {planned}, held {held}"
    return steps, laboratory.weights(learner)


def deviations(folder: Path, settings: dict[str, Any], cases: list[tuple[str, str]]) -> list[str]:
    """What differs from the reference by more than the tolerance, as this rank sees it."""
    found = []
    for model, objective in cases:
        expected, one_rank = torch.load(folder / f"{model}-{objective}.pt", weights_only=False)
        steps, weights = _train(folder, model, objective, settings)
        for number, (metrics, gradients) in enumerate(steps):
            where = f"{model} {objective} step {number}: "
            values = one_rank[number] | {
                "loss": expected[number].loss,
                "grad_norm": expected[number].grad_norm,
            }
            found += [
                f"{where}{name} {metrics.get(name)} instead of {value}"
                for name, value in values.items()
                if metrics.get(name) != pytest.approx(value, rel=TOLERANCE, abs=1e-6)
            ]
            found += [
                f"{where}gradient of {problem}"
                for problem in _different(gradients, expected[number].gradients)
            ]
        found += [
            f"{model} {objective} after all steps: {problem}"
            for problem in _different(weights, expected[-1].weights)
        ]
    return found


def _different(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    if not ours:  # not global rank 0
        return []
    assert ours.keys() == expected.keys()
    errors = {name: tiny.relative_error(ours[name], expected[name]) for name in expected}
    return [f"{name} off by {error:.1e}" for name, error in errors.items() if error > TOLERANCE]

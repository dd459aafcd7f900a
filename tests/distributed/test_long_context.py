"""Sequences of 32K tokens under YaRN, packed and cut into context-parallel chunks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klear_megatron.policy.batch import Batch
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LENGTHS = [300, 32768, 7]  # the long one starts in the middle of its pack
BUDGET = 40_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.qwen3(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters=tiny.yarn(factor=2.5, original=13108),
    )
    return tiny.write(tmp_path_factory.mktemp("long") / "qwen3", config)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Tensor:
    with torch.no_grad():
        log_probs, _ = tiny.hf_log_probs(tiny.load(checkpoint), tiny.random_sequences(LENGTHS))
    return log_probs


def _log_probs(checkpoint: Path, parallel: dict[str, int]) -> Any:
    # The budget is of one rank's share of the tokens.
    budget = BUDGET // parallel.get("context_parallel_size", 1)
    learner = make_learner(checkpoint, parallel=parallel, tokens_per_micro_batch=budget)
    return learner.model.log_probs(Batch.from_sequences(tiny.random_sequences(LENGTHS)))[0]


@pytest.mark.parametrize(
    "parallel",
    [{}, {"context_parallel_size": 2}, {"tensor_model_parallel_size": 2}],
    ids=["one", "cp2", "tp2"],
)
def test_log_probs_at_32k_are_hugging_faces(parallel, checkpoint, reference):
    ranks = 2 if parallel else 1
    log_probs, *_ = run_ranks(ranks, _log_probs, checkpoint, parallel, timeout=300)
    assert tiny.relative_error(log_probs, reference) < 1e-5


def test_the_bound_would_catch_a_missing_yarn(checkpoint, reference):
    model = tiny.load(checkpoint)
    plain = tiny.qwen3(
        **{
            **model.config.to_dict(),
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        }
    )
    model.model.rotary_emb = type(model.model.rotary_emb)(plain)
    with torch.no_grad():
        log_probs, _ = tiny.hf_log_probs(model, tiny.random_sequences(LENGTHS))
    assert tiny.relative_error(log_probs, reference) > 1e-2

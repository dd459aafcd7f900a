"""Models that live beside each other, and what a step costs beyond its numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from klear_megatron.losses import SFTObjective
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import ModelConfig
from klear_megatron.policy.model import Model
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LENGTHS = [9, 33, 17, 40, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trained` and `reference`: models of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write(folder / "trained", tiny.qwen3(), seed=0)
    tiny.write(folder / "reference", tiny.qwen3(), seed=1)
    return folder


def _batch() -> Batch:
    sequences = tiny.random_sequences(LENGTHS)
    return Batch.from_sequences(sequences, loss_mask=[[1.0] * len(s) for s in sequences])


def _forward_only(path: Path, **settings: Any) -> Model:
    settings = {"dtype": "float32", "tokens_per_micro_batch": 64, **settings}
    model = Model(ModelConfig.model_validate({"path": path, **settings}), ModelFolder(path))
    model.load(path)
    return model


def _train_beside_a_reference(folder: Path, parallel: dict[str, int]) -> Any:
    learner = make_learner(folder / "trained", parallel=parallel)
    reference = _forward_only(folder / "reference", parallel=parallel)
    before = reference.log_probs(_batch())[0]
    trained = [learner.model.log_probs(_batch())[0]]
    learner.train_step(_batch(), SFTObjective())
    trained.append(learner.model.log_probs(_batch())[0])
    return before, reference.log_probs(_batch())[0], trained


@pytest.mark.parametrize(
    "parallel",
    [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}],
    ids=["tp2", "pp2", "dp2"],
)
def test_a_reference_model_stays_as_it_is_beside_one_that_is_trained(folder, parallel):
    before, after, trained = run_ranks(2, _train_beside_a_reference, folder, parallel)[0]
    with torch.no_grad():
        sequences = tiny.random_sequences(LENGTHS)
        expected = {
            n: tiny.hf_log_probs(tiny.load(folder / n), sequences)[0]
            for n in ("trained", "reference")
        }
    assert tiny.relative_error(before, expected["reference"]) < 1e-5
    assert torch.equal(before, after)
    assert tiny.relative_error(trained[0], expected["trained"]) < 1e-5
    assert tiny.relative_error(trained[1], expected["trained"]) > 1e-3


def _of_another_layout(folder: Path) -> str:
    make_learner(folder / "trained", parallel={"tensor_model_parallel_size": 2})
    with pytest.raises(UserError) as error:
        _forward_only(folder / "reference")
    return str(error.value)


def test_models_of_one_process_need_the_same_layout(folder):
    assert "TP 1 beside a model of TP 2" in run_ranks(2, _of_another_layout, folder)[0]


def _count_norms_and_embeddings(folder: Path) -> tuple[int, int]:
    learner = make_learner(folder / "trained", tokens_per_micro_batch=1)  # one sequence a pack
    norms = []
    get_grad_norm = learner._optimizer.get_grad_norm

    def counted() -> Any:
        norms.append(get_grad_norm())
        return norms[-1]

    learner._optimizer.get_grad_norm = counted
    cached = type(learner.model.chunks[0].rotary_pos_emb).forward
    cached.cache_clear()
    learner.train_step(_batch(), SFTObjective())
    return len(norms), cached.cache_info().misses


def test_a_step_computes_one_norm_and_few_rotary_embeddings(folder):
    # Lengths 9, 33, 17, 40 and 5 need embeddings for 16, 64, 32, 64 and 8 positions.
    assert run_ranks(1, _count_norms_and_embeddings, folder) == [(1, 4)]

"""The policy's verbs on one rank, against Hugging Face with the losses written out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.losses import GPPOConfig, PolicyObjective, SFTObjective
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.weights import load_hf_weights
from tests.distributed.laboratory import make_learner, train, weights
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LENGTHS = [7, 60, 2, 33, 1, 90, 18]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("policy") / "qwen3", tiny.qwen3())


def _batch(seed: int = 1) -> Batch:
    """Responses after prompts of two tokens, some correct, from a policy that was another."""
    sequences = tiny.random_sequences(LENGTHS, seed)
    generator = torch.Generator().manual_seed(seed)

    def per_token(values: list[float]) -> list[list[float]]:
        return [[value] * len(s) for value, s in zip(values, sequences, strict=True)]

    return Batch.from_sequences(
        sequences,
        loss_mask=[[0.0, 0.0, *[1.0] * len(s)][: len(s)] for s in sequences],
        advantages=per_token(torch.randn(len(sequences), generator=generator).tolist()),
        correct=per_token([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        old_log_probs=[
            (-5 + 2 * torch.randn(len(s), generator=generator)).tolist() for s in sequences
        ],
    )


def _log_probs(path: Path, temperature: float) -> Any:
    return make_learner(path, temperature=temperature).model.log_probs(_batch())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_entropy_are_hugging_faces(temperature, checkpoint):
    ((log_probs, entropy),) = run_ranks(1, _log_probs, checkpoint, temperature)
    with torch.no_grad():
        expected = tiny.hf_log_probs(
            tiny.load(checkpoint), tiny.random_sequences(LENGTHS), temperature
        )
    assert tiny.relative_error(log_probs, expected[0]) < 1e-5
    assert tiny.relative_error(entropy, expected[1]) < 1e-5


def _one_step(path: Path, objective: Any, temperature: float) -> Any:
    return train(make_learner(path, temperature=temperature), [_batch()], objective)[0]


def _sft_loss(log_probs: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = batch.fields["loss_mask"]
    return -(log_probs * mask).sum() / mask.sum()


def _gppo_loss(log_probs: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask, correct, old, advantage = (
        batch.fields[name] for name in ("loss_mask", "correct", "old_log_probs", "advantages")
    )
    ratio = (log_probs - old).exp()
    constant = ratio.detach()
    clipped = torch.minimum(
        ratio * advantage,
        torch.where(
            constant < 0.8,
            0.8 / constant * ratio,
            torch.where(constant > 1.28, 1.28 / constant * ratio, ratio),
        )
        * advantage,
    )
    sft = -(log_probs * mask * correct).sum() / (mask * correct).sum()
    return -(clipped * mask).sum() / mask.sum() + 0.1 * sft


@pytest.mark.parametrize(
    ("objective", "written_out", "temperature"),
    [
        (SFTObjective(), _sft_loss, 1.0),
        (PolicyObjective(GPPOConfig(dual_clip=None)), _gppo_loss, 0.8),
    ],
)
def test_gradients_are_those_of_plain_autograd(objective, written_out, temperature, checkpoint):
    ((metrics, gradients),) = run_ranks(1, _one_step, checkpoint, objective, temperature)
    model, batch = tiny.load(checkpoint), _batch()
    log_probs, _ = tiny.hf_log_probs(model, tiny.random_sequences(LENGTHS), temperature)
    loss = written_out(log_probs, batch)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    assert metrics["grad_norm"] == pytest.approx(torch.stack(norms).norm().item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert tiny.relative_error(gradients[name], parameter.grad) < 1e-5, name


def _steps_with_a_save_between(path: Path, folder: Path) -> Any:
    learner = make_learner(path, optimizer={"lr_warmup_steps": 3})
    objective = SFTObjective()
    for seed in (1, 2):
        learner.train_step(_batch(seed), objective)
    learner.save(folder / "saved", {"step": 2})
    after = [learner.train_step(_batch(seed), objective) for seed in (3, 4, 5)]
    final = weights(learner)

    resumed = make_learner(path, optimizer={"lr_warmup_steps": 3})
    state = resumed.load(folder / "saved")
    again = [resumed.train_step(_batch(seed), objective) for seed in (3, 4, 5)]
    return after, again, state, final, weights(resumed)


def test_a_loaded_policy_goes_on_as_if_nothing_had_happened(checkpoint, tmp_path):
    ranks = run_ranks(2, _steps_with_a_save_between, checkpoint, tmp_path)
    for after, again, state, final, final_again in ranks:
        assert state == {"step": 2}
        assert again == after
        assert final.keys() == final_again.keys()
        assert all(torch.equal(final[name], final_again[name]) for name in final)


def _learn_by_heart(path: Path) -> Any:
    learner = make_learner(path, dtype="bfloat16", optimizer={"lr": 2e-4, "weight_decay": 0.0})
    before = weights(learner)
    losses = [learner.train_step(_batch(), SFTObjective())["loss"] for _ in range(20)]
    return losses, before, weights(learner)


def test_bfloat16_trains_by_float32_master_weights(checkpoint):
    ((losses, before, after),) = run_ranks(1, _learn_by_heart, checkpoint)
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    # A step of 2e-4 is far less than half the distance between bfloat16 numbers near 1: added to
    # the bfloat16 weight itself it would vanish, however many steps there are.
    norm = "model.norm.weight"
    far = before[norm] > 0.75
    assert far.any()
    assert (after[norm] != before[norm])[far].any()
    assert losses[-1] < losses[0]


def _values_before_rounding(path: Path) -> Any:
    learner = make_learner(path)
    parameters = [p for name, p in learner.model.chunks[0].named_parameters() if "linear" in name]
    kept = [torch.zeros_like(p) for p in parameters]
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.get_high_precision_init_val = lambda value=value: value
    load_hf_weights(learner.model.chunks, learner.model.table, path)
    return [(p.detach(), value) for p, value in zip(parameters, kept, strict=True)]


def test_what_transformer_engine_keeps_beside_fp8_weights_is_loaded_too(checkpoint):
    (pairs,) = run_ranks(1, _values_before_rounding, checkpoint)
    assert len(pairs) == 4 * 4
    assert all(torch.equal(parameter, value) for parameter, value in pairs)

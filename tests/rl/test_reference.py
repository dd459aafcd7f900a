"""The reference stays as it was while the policy is trained."""

from pathlib import Path

import torch

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import GPPOConfig, PolicyObjective, kl_to_reference
from klear_megatron.planning import PlannedModel
from klear_megatron.planning.layout import Layout
from klear_megatron.planning.state import Formats, roughly
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.learner import Learner
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.reference import make_reference
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LENGTHS = [9, 14]


def _config(folder: Path, penalty: dict[str, object]) -> RLConfig:
    policy = {
        "path": folder,
        "dtype": "float32",
        "optimizer": {"lr": 1e-2},
        "parallel": {"tensor_model_parallel_size": 2},
    }
    settings = {"run_dir": folder, "steps": 1, "policy": policy, "data": {"path": folder}}
    return RLConfig.model_validate(settings | {"loss": {"kl": penalty}})


def _train_and_compare(base: Path, other: Path) -> None:
    in_loss = _config(base, {"coeff": 0.5})
    learner = Learner(in_loss.policy, ModelFolder(base), total_steps=1)
    of_base = make_reference(in_loss, ModelFolder(base))
    held = sum(p.nbytes for module in of_base._model.modules for p in module.parameters())
    layout = Layout(in_loss.policy.parallel, 2)
    assert held == roughly(PlannedModel.read(base), layout, 0, Formats(4, 4)).weights
    in_reward = _config(
        base, {"coeff": 0.5, "estimator": "k1", "within": "reward", "reference": other}
    )
    of_other = make_reference(in_reward, ModelFolder(base))

    batch = Batch.from_sequences(
        tiny.random_sequences(LENGTHS),
        loss_mask=[[0.0] * 3 + [1.0] * (length - 3) for length in LENGTHS],
        correct=[[0.0] * length for length in LENGTHS],
        advantages=[[1.0] * length for length in LENGTHS],
    )
    first, _ = learner.model.log_probs(batch)
    batch = batch.with_fields(old_log_probs=first)
    compared, metrics = of_base.compare(batch)
    assert torch.equal(compared.fields["ref_log_probs"], first)
    assert metrics == {"rollout/kl_to_reference": 0.0}

    learner.train_step(batch, PolicyObjective(GPPOConfig()))
    trained, _ = learner.model.log_probs(batch)
    compared, metrics = of_base.compare(batch.with_fields(old_log_probs=trained))
    assert torch.equal(compared.fields["ref_log_probs"], first)
    assert torch.equal(compared.fields["advantages"], batch.fields["advantages"])
    mask = batch.fields["loss_mask"]
    k3 = (kl_to_reference(trained, first, "k3") * mask).sum() / mask.sum()
    assert metrics == {"rollout/kl_to_reference": k3.item()}
    assert k3 > 1e-3
    step = learner.train_step(compared, PolicyObjective(in_loss.loss))
    torch.testing.assert_close(step["kl_to_reference"], k3.item())

    compared, metrics = of_other.compare(batch)
    assert "ref_log_probs" not in compared.fields
    taken = (batch.fields["advantages"] - compared.fields["advantages"]) / 0.5
    assert not taken[mask == 0].any()
    mean = taken.sum().item() / mask.sum().item()
    torch.testing.assert_close(metrics["rollout/kl_to_reference"], mean)
    # k1 is the difference of the two models' log-probabilities.
    expected, _ = tiny.hf_log_probs(tiny.load(other), tiny.random_sequences(LENGTHS))
    torch.testing.assert_close((first - expected.detach()) * mask, taken, rtol=1e-4, atol=1e-4)


def test_the_reference_is_not_trained_and_may_be_another_model(tmp_path):
    base = tiny.write(tmp_path / "base", tiny.qwen3())
    other = tiny.write(tmp_path / "other", tiny.qwen3(), seed=1)
    run_ranks(2, _train_and_compare, base, other)

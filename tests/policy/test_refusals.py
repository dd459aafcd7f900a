"""Bad input to the policy gets one message that says what, where and what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from klear_megatron.errors import UserError
from klear_megatron.losses import Result, SFTObjective
from klear_megatron.policy.batch import Batch
from klear_megatron.training.steps_taken import StepsTaken
from tests.distributed.laboratory import make_learner, weights
from tests.distributed.ranks import run_ranks
from tests.models import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.qwen3(num_hidden_layers=2)
    return tiny.write(tmp_path_factory.mktemp("refusals") / "qwen3", config)


def _messages(cases: list[dict[str, Any]]) -> list[str]:
    messages = []
    for case in cases:
        with pytest.raises(UserError) as error:
            make_learner(**case)
        messages.append(str(error.value))
    return messages


def _copy(checkpoint: Path, to: Path, weights: Any = None, **config: Any) -> Path:
    shutil.copytree(checkpoint, to)
    values = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(values))
    if weights is not None:
        tensors = load_file(to / "model.safetensors")
        weights(tensors)
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_checkpoints(checkpoint, tmp_path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_norm.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(96, 32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)

    untied = _copy(checkpoint, tmp_path / "untied", tie_word_embeddings=True)
    truncated = _copy(checkpoint, tmp_path / "truncated")
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    incomplete = _copy(checkpoint, tmp_path / "incomplete")
    (incomplete / "model.safetensors").unlink()
    sharded = _copy(checkpoint, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))

    expected = {
        tmp_path / "nowhere": ["nowhere: no such folder"],
        _copy(checkpoint, tmp_path / "spoilt", spoil): [
            "2 missing from the weights: model.layers.1.self_attn.k_norm.weight, model.norm.weight",
            "1 not in the model: model.layers.0.self_attn.q_proj.bias",
            "1 of another shape: model.layers.0.mlp.gate_proj.weight: (96, 32) in the file, "
            "(96, 64) by the config",
        ],
        _copy(checkpoint, tmp_path / "deeper", num_hidden_layers=3): [
            "config.json: ",
            "`num_hidden_layers` (3) must be equal to the number of `layer_types` (2)",
        ],
        _copy(checkpoint, tmp_path / "wider", intermediate_size=128): [
            "model.layers.1.mlp.down_proj.weight: (64, 96) in the file, (64, 128) by the config"
        ],
        untied: ["lm_head.weight differs from model.embed_tokens.weight"],
        truncated: ["truncated or corrupt"],
        incomplete: ["neither model.safetensors nor model.safetensors.index.json"],
        sharded: ["model-00001-of-00002.safetensors", "missing, truncated or corrupt"],
        _copy(checkpoint, tmp_path / "other", architectures=["Qwen3ForCausalML"]): [
            "unknown architecture 'Qwen3ForCausalML'; known: ",
            "register_architecture",
        ],
        _copy(checkpoint, tmp_path / "window", use_sliding_window=True): [
            "use_sliding_window=True is not supported"
        ],
    }
    (messages,) = run_ranks(1, _messages, [{"path": path} for path in expected])
    for (path, parts), message in zip(expected.items(), messages, strict=True):
        assert str(path) in message
        for part in parts:
            assert part in message


def _load(path: Path, imports: list[str]) -> Any:
    with pytest.raises(UserError, match=r"policy\.imports: cannot import 'tests\.models\.nowhere'"):
        make_learner(path, imports=["tests.models.nowhere"])
    return weights(make_learner(path, imports=imports))


def test_a_file_of_the_users_own_makes_its_architecture_known(checkpoint, tmp_path):
    path = _copy(checkpoint, tmp_path / "mine", architectures=["MyModelForCausalLM"])
    (message,) = run_ranks(1, _messages, [{"path": path}])[0]
    assert "unknown architecture 'MyModelForCausalLM'" in message
    assert "policy.imports" in message
    (tensors,) = run_ranks(1, _load, path, ["tests.models.my_architecture"])
    assert tensors.keys() == load_file(checkpoint / "model.safetensors").keys()


def test_layouts(checkpoint):
    def layout(**sizes: int) -> dict[str, int]:
        return {f"{name}_parallel_size": size for name, size in sizes.items()}

    def stages(first: int | None = None, last: int | None = None) -> dict[str, int | None]:
        return {
            **layout(pipeline_model=3),
            "num_layers_in_first_pipeline_stage": first,
            "num_layers_in_last_pipeline_stage": last,
        }

    expected = [
        (layout(tensor_model=2, context=2), "world size 3 is not divisible by TP x PP x CP = 2 x"),
        (layout(expert_model=2), "3 is not divisible by PP x EP x expert TP = 1 x 2 x 1 = 2"),
        (layout(expert_model=3), "the model has no experts"),
        (layout(tensor_model=3), "num_attention_heads = 8 is not divisible by 3"),
        (layout(pipeline_model=3), "num_hidden_layers = 2 is not divisible by PP x VPP = 3"),
        (stages(first=1), "1 are left by num_layers_in_first_pipeline_stage (1) and"),
        (stages(last=2), "0 are left by num_layers_in_first_pipeline_stage (None) and"),
        (stages(first=1, last=1), "cannot be divided over the other stages x VPP = 1 x 1"),
        (stages(first=2, last=2), "= 2, -2 are left by"),
    ]
    cases = [{"path": checkpoint, "parallel": parallel} for parallel, _ in expected]
    for messages in run_ranks(3, _messages, cases):
        for (_, part), message in zip(expected, messages, strict=True):
            assert part in message


class _NoNumber(SFTObjective):
    def __call__(self, *inputs: Any) -> Result:
        result = super().__call__(*inputs)
        loss = result.loss * float("nan")
        return Result(loss, result.sums | {"loss": loss.detach()})


def _step_on_nonsense(path: Path, run_dir: Path) -> Any:
    learner, steps_taken = make_learner(path), StepsTaken(run_dir)
    tokens = tiny.random_sequences([9, 30])
    mask = [[1.0] * 9, [1.0] * 30]
    before = weights(learner)
    good = Batch.from_sequences(tokens, loss_mask=mask)
    bad = Batch.from_sequences(tokens, loss_mask=[[1.0] * 9, [float("nan")] * 30])
    taken = [steps_taken(1, bad, learner.train_step(bad, SFTObjective())) for _ in range(2)]
    after, steps = weights(learner), [learner.optimizer_steps]
    taken.append(steps_taken(2, good, learner.train_step(good, SFTObjective())))
    later, steps = weights(learner), [*steps, learner.optimizer_steps]
    taken += [steps_taken(3, bad, learner.train_step(bad, SFTObjective())) for _ in range(2)]
    three = "gradients of 3 mini-batches in a row are not finite"
    with pytest.raises(UserError, match=f"{three}.* the weights are to blame"):
        steps_taken(4, bad, learner.train_step(bad, SFTObjective()))
    taken.append(steps_taken(5, good, learner.train_step(good, SFTObjective())))
    taken += [steps_taken(6, good, learner.train_step(good, _NoNumber())) for _ in range(2)]
    with pytest.raises(UserError, match=f"{three}.* the loss is to blame: it is nan"):
        steps_taken(7, good, learner.train_step(good, _NoNumber()))
    return before, after, later, taken, steps


def test_steps_whose_gradients_are_not_finite_are_skipped_and_end_the_run_after_three(
    checkpoint, tmp_path
):
    results = run_ranks(2, _step_on_nonsense, checkpoint, tmp_path)
    before, after, later, taken, steps = results[0]
    assert taken == results[1][3] == [False, False, True, False, False, True, False, False]
    assert steps == [0, 1]
    # Readable without torch.
    kept = np.load(tmp_path / "not_finite" / "step_00000004_3.npz")
    assert kept["lengths"].tolist() == [9, 30]
    assert np.isnan(kept["loss_mask"]).tolist() == [False] * 9 + [True] * 30
    assert len(kept["tokens"]) == 39
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(later[name].isfinite().all() for name in later)

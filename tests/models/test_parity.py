"""Megatron's model agrees with Hugging Face's, and the weights survive a round trip."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.laboratory import logits, make_learner, weights
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LENGTHS = [5, 64, 17, 1, 100, 23]  # beyond YaRN's original length, and one of a single token

MODELS = {
    "qwen3": tiny.qwen3(),
    "qwen3-tied": tiny.qwen3(tie_word_embeddings=True),
    "qwen3-yarn": tiny.qwen3(rope_parameters=tiny.yarn(factor=4.0)),
    "qwen2": tiny.qwen2(),
    "qwen2-tied": tiny.qwen2(tie_word_embeddings=True),
    "llama3": tiny.llama3(),
    "qwen3-moe": tiny.qwen3_moe(),
}
TP, PP, EP, EXPERT_TP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
LAYOUTS: list[tuple[int, dict[str, int], list[str]]] = [
    (1, {}, list(MODELS)),
    (2, {TP: 2}, list(MODELS)),
    (2, {PP: 2}, list(MODELS)),
    (4, {TP: 2, PP: 2}, list(MODELS)),
    (2, {EP: 2}, ["qwen3-moe"]),
    (2, {TP: 2, EP: 2, EXPERT_TP: 1}, ["qwen3-moe"]),
    (4, {TP: 2, EP: 2, EXPERT_TP: 2}, ["qwen3-moe"]),
    (4, {PP: 2, EP: 2}, ["qwen3-moe"]),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.write(folder / name, config) for name, config in MODELS.items()}


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> dict[str, torch.Tensor]:
    sequences = tiny.random_sequences(LENGTHS)
    with torch.no_grad():
        return {
            name: torch.cat([tiny.load(path)(torch.tensor([s])).logits[0] for s in sequences])
            for name, path in checkpoints.items()
        }


def _logits_and_weights(
    checkpoints: dict[str, Path], parallel: dict[str, int], dtype: str
) -> dict[str, Any]:
    results = {}
    for name, path in checkpoints.items():
        learner = make_learner(path, dtype=dtype, parallel=parallel)
        results[name] = (logits(learner, tiny.random_sequences(LENGTHS)), weights(learner))
    return results


@pytest.mark.parametrize(("world_size", "parallel", "models"), LAYOUTS)
def test_logits_and_weights_are_hugging_faces(world_size, parallel, models, checkpoints, reference):
    paths = {name: checkpoints[name] for name in models}
    ranks = run_ranks(world_size, _logits_and_weights, paths, parallel, "float32")
    for name, path in paths.items():
        ours = [answer[name][0] for answer in ranks if answer[name][0] is not None]
        assert len(ours) == world_size // parallel.get(PP, 1)
        for each in ours:
            assert tiny.relative_error(each, reference[name]) < 1e-5, name
        _assert_identical(ranks[0][name][1], load_file(path / "model.safetensors"))
        assert all(not answer[name][1] for answer in ranks[1:])


def _assert_identical(ours: dict[str, torch.Tensor], file: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == file.keys()
    for name, tensor in file.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_bfloat16_weights_come_back_bit_identical(tmp_path):
    paths = {"bf16": tiny.write(tmp_path / "bf16", tiny.qwen3(), dtype=torch.bfloat16)}
    answer, *_ = run_ranks(2, _logits_and_weights, paths, {TP: 2}, "bfloat16")
    _assert_identical(answer["bf16"][1], load_file(paths["bf16"] / "model.safetensors"))

"""Checkpoints of every layout become the same Hugging Face weights, and the other way round."""

from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.conversion import export_hf, hf_to_megatron, megatron_to_hf
from klear_megatron.policy.checkpoint import load_weights
from tests.conversion.folders import same_weights, weights_of
from tests.distributed.laboratory import make_policy
from tests.distributed.ranks import run_ranks
from tests.models import tiny

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "virtual_pipeline_model_parallel_size": 2}
Layouts = dict[int, dict[str, dict[str, Any]]]
"""World size -> name -> ParallelConfig."""
MODELS: dict[str, tuple[Any, Layouts]] = {
    "untied": (
        tiny.qwen3(),
        {
            1: {"single": {}},
            2: {"tp2": TP2, "pp2": PP2, "vpp": VPP},
            4: {"tp2_pp2": {**TP2, **PP2}, "tp4": {"tensor_model_parallel_size": 4}},
        },
    ),
    "tied": (tiny.qwen3(tie_word_embeddings=True), {2: {"tp2": TP2, "pp2": PP2, "vpp": VPP}}),
}


def _on_ranks(layouts: dict[str, Any], hf: Path, converted: Path, folder: Path) -> None:
    """In each layout: loads the converted weights and exports them; steps, saves, exports."""
    for name, parallel in layouts.items():
        policy = make_policy(hf, parallel=parallel)
        parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
        for parameter in parameters:
            parameter.data.fill_(torch.nan)
        load_weights(converted, policy.chunks)
        export_hf(policy, folder / f"{name}_loaded")
        for parameter in parameters:
            parameter.main_grad.fill_(1.0)
        policy._optimizer.reload_model_params()
        policy._optimizer.step()
        policy.save(folder / f"{name}_megatron", {"step": 1})
        export_hf(policy, folder / f"{name}_stepped")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, (config, layouts_by_world_size) in MODELS.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        hf = tiny.write(folder / "hf", config)
        hf_to_megatron(hf, folder / "megatron", tensor_parallel_size=2, shard_bytes=100_000)
        for world_size, layouts in layouts_by_world_size.items():
            run_ranks(world_size, _on_ranks, layouts, hf, folder / "megatron", folder)
    return folders


@pytest.mark.parametrize(
    ("model", "layout"),
    [(m, name) for m, (_, sizes) in MODELS.items() for names in sizes.values() for name in names],
)
def test_layout(model: str, layout: str, folders: dict[str, Path]) -> None:
    folder = folders[model]
    original = weights_of(folder / "hf")
    assert same_weights(weights_of(folder / f"{layout}_loaded"), original)

    megatron_to_hf(folder / f"{layout}_megatron", folder / f"{layout}_back", shard_bytes=60_000)
    stepped = weights_of(folder / f"{layout}_stepped")
    assert not same_weights(stepped, original)
    assert same_weights(weights_of(folder / f"{layout}_back"), stepped)

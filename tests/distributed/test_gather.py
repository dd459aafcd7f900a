"""Full tensors are put together on the ranks that hold them, as on one rank for all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from klear_megatron.platform import objects
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny


def _gather(checkpoint: Path, parallel: dict[str, int]) -> Any:
    """The full tensors as one rank gets them, as all ranks together do, and who said it would."""
    model = make_learner(checkpoint, parallel=parallel).model
    whole = {name: tensor.clone() for name, tensor in model.named_hf_tensors()}
    for _ in range(2):  # the second time as the first
        own = [(name, tensor.clone()) for name, tensor in model.own_hf_tensors()]
    placed = [one for one in model.placed_hf_tensors if one.rank == dist.get_rank()]
    assert [(one.name, one.dtype, one.shape) for one in placed] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in own
    ]
    return whole, objects.all_gather(dict(own))


@pytest.mark.parametrize(
    ("parallel", "config", "on_rank_1"),
    [
        ({"tensor_model_parallel_size": 2}, tiny.qwen3(), set()),
        ({"pipeline_model_parallel_size": 2}, tiny.qwen3(), {"layers.2", "layers.3"}),
        ({"expert_model_parallel_size": 2}, tiny.qwen3_moe(), {"experts.4", "experts.7"}),
    ],
    ids=["tp2", "pp2", "ep2"],
)
def test_each_stage_puts_its_own_tensors_together(parallel, config, on_rank_1, tmp_path):
    checkpoint = tiny.write(tmp_path / "model", config)
    (whole, owned), _ = run_ranks(2, _gather, checkpoint, parallel)
    assert not owned[0].keys() & owned[1].keys()
    together = owned[0] | owned[1]
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())
    assert bool(owned[1]) == bool(on_rank_1)
    for part in on_rank_1:
        assert any(part in name for name in owned[1]), owned[1].keys()

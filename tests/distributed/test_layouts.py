"""One answer whatever the layout: loss, metrics, every gradient, clipping, three steps' weights."""

from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from klear_megatron.policy import build
from tests.distributed import laboratory
from tests.distributed.comparison import DEEP, DENSE, MOE, deviations
from tests.distributed.ranks import run_ranks


def layout(name: str, world_size: int = 1, **settings: Any) -> Any:
    """`tp=2` and the like are sizes, `first` and `last` numbers of layers in those stages; what is
    not about layouts is the policy's."""
    sizes = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "expert_tp": "expert_tensor_parallel_size",
        "overlap_grad_reduce": "overlap_grad_reduce",
        "overlap_param_gather": "overlap_param_gather",
    }
    parallel = {sizes[key]: settings.pop(key) for key in list(settings) if key in sizes}
    cases = {"moe": MOE, "deep": DEEP}.get(name.split("-")[0], DENSE)
    return pytest.param(world_size, {**settings, "parallel": parallel}, cases, id=name)


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = [
    layout("one"),
    layout("one-no-packing", tokens_per_micro_batch=1),
    layout("one-all-packed", tokens_per_micro_batch=10_000),
    layout("recompute-full", recompute_granularity="full"),
    layout("recompute-attention", recompute_granularity="selective"),
    layout(
        "recompute-mlp", recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]
    ),
    layout("dp2", 2),
    layout("dp2-no-packing", 2, tokens_per_micro_batch=1),
    layout("dp2-overlap-reduce", 2, overlap_grad_reduce=True),
    layout("dp2-overlap", 2, **OVERLAP),
    layout("tp2", 2, tp=2),
    layout("tp2-all-packed", 2, tp=2, tokens_per_micro_batch=10_000),
    layout("tp2-recompute", 2, tp=2, recompute_granularity="full"),
    layout("pp2", 2, pp=2),
    layout("pp2-no-packing", 2, pp=2, tokens_per_micro_batch=1),
    layout("pp2-recompute", 2, pp=2, recompute_granularity="full"),
    layout("pp2-vpp2", 2, pp=2, vpp=2),
    layout("pp2-first1", 2, pp=2, first=1),
    layout("pp2-first3-last1", 2, pp=2, first=3, last=1),
    layout("cp2", 2, cp=2),
    layout("cp2-no-packing", 2, cp=2, tokens_per_micro_batch=1),
    layout("cp2-all-packed", 2, cp=2, tokens_per_micro_batch=10_000),
    layout("cp2-recompute", 2, cp=2, recompute_granularity="selective"),
    layout("dp4", 4),
    layout("tp4", 4, tp=4),
    layout("pp4", 4, pp=4),
    layout("cp4", 4, cp=4),
    layout("tp2-dp2", 4, tp=2),
    layout("pp2-dp2", 4, pp=2),
    layout("cp2-dp2", 4, cp=2),
    layout("pp2-dp2-overlap", 4, pp=2, **OVERLAP),
    layout("tp2-dp2-overlap", 4, tp=2, **OVERLAP),
    layout("pp2-vpp2-dp2-overlap", 4, pp=2, vpp=2, **OVERLAP),
    layout("tp2-pp2", 4, tp=2, pp=2),
    layout("pp3-last2", 3, pp=3, last=2),
    layout("pp3-first1-last1-overlap", 3, pp=3, first=1, last=1, **OVERLAP),
    layout("tp2-pp2-last1", 4, tp=2, pp=2, last=1),
    layout("tp2-cp2", 4, tp=2, cp=2),
    layout("pp2-cp2", 4, pp=2, cp=2),
    layout("pp2-vpp2-cp2", 4, pp=2, vpp=2, cp=2),
    layout("tp2-pp2-cp2", 8, tp=2, pp=2, cp=2),
    layout("tp2-pp2-vpp2-dp2-overlap", 8, tp=2, pp=2, vpp=2, **OVERLAP),
    layout("tp2-cp2-dp2-all-packed", 8, tp=2, cp=2, tokens_per_micro_batch=10_000),
    layout("deep-pp2-vpp2-first2", 2, pp=2, vpp=2, first=2),
    layout("deep-tp2-pp2-vpp2-last2-overlap", 4, tp=2, pp=2, vpp=2, last=2, **OVERLAP),
    layout("moe"),
    layout("moe-dp2", 2),
    layout("moe-ep2-dp2", 2, ep=2),
    layout("moe-ep2-dp2-recompute", 2, ep=2, recompute_granularity="full"),
    layout("moe-tp2", 2, tp=2),
    layout("moe-tp2-ep2", 2, tp=2, ep=2, expert_tp=1),
    layout("moe-cp2-ep2", 2, cp=2, ep=2),
    layout("moe-ep2-dp4-overlap", 4, ep=2, **OVERLAP),
    layout("moe-tp2-ep2-expert_tp2", 4, tp=2, ep=2, expert_tp=2),
    layout("moe-pp2-ep2", 4, pp=2, ep=2),
    layout("moe-pp2-first1-ep2", 4, pp=2, first=1, ep=2),
]


@pytest.mark.parametrize(("world_size", "settings", "cases"), LAYOUTS)
def test_every_layout_gives_hugging_faces_answer(world_size, settings, cases, folder):
    for rank, found in enumerate(run_ranks(world_size, deviations, folder, settings, cases)):
        assert not found, f"rank {rank}:\n" + "\n".join(found)


def _overlap(folder: Any) -> tuple[int, bool]:
    """A learner's number of buckets, and whether Megatron's default holds again afterwards."""
    learner = laboratory.make_learner(folder / "untied", parallel=OVERLAP)
    buckets = [len(buffer.buckets) for m in learner.model.modules for buffer in m.buffers]
    return sum(buckets), build.DistributedDataParallelConfig is DistributedDataParallelConfig


def test_overlap_has_several_buckets_and_leaves_megatrons_default(folder):
    for buckets, restored in run_ranks(2, _overlap, folder):
        assert buckets > 3
        assert restored

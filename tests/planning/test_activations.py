"""Planned activations are those that autograd saves, on every rank, within 5 %."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from klear_megatron.losses import SFTObjective
from klear_megatron.planning.activations import Activations
from klear_megatron.planning.layout import Layout
from klear_megatron.planning.memory import saved_bytes
from klear_megatron.planning.model import PlannedModel
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.packing import plan_micro_batches
from tests.distributed import laboratory
from tests.distributed.ranks import run_ranks
from tests.models import tiny
from tests.planning.held import saved_by_autograd

BOUND = 0.05
LENGTHS = [512, 256, 192, 64, 384, 128, 512, 512]
BUDGET = 512

FULL = {"recompute_granularity": "full"}
BF16 = {"dtype": "bfloat16"}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def parallel(**sizes: int) -> dict[str, Any]:
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "expert_tp": "expert_tensor_parallel_size",
    }
    return {"parallel": {names[name]: size for name, size in sizes.items()}}


RUNS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [
        ("qwen2", {**BF16, **selective("core_attn")}),
        *(
            (model, {**dtype, **recompute})
            for model in ("qwen3", "moe")
            for dtype in ({}, BF16)
            for recompute in (
                {},
                FULL,
                selective("core_attn"),
                selective("core_attn", "mlp", "moe"),
            )
        ),
    ],
    2: [
        ("qwen3", parallel(tp=2)),
        ("qwen3", {**BF16, **FULL, **parallel(cp=2)}),
        ("qwen3", {**selective("core_attn"), **parallel(cp=2)}),
        ("qwen2", {**BF16, **parallel(cp=2)}),
        ("qwen3", {**FULL, **parallel(pp=2)}),
        ("qwen3", {**BF16, **FULL, **parallel(pp=2, vpp=2)}),
        ("moe", parallel(ep=2)),
        ("moe", {**BF16, **parallel(tp=2)}),
    ],
    4: [
        ("qwen3", {**BF16, **parallel(pp=4)}),
        ("qwen3", parallel(tp=2, cp=2)),
        ("moe", {**BF16, **parallel(tp=2, ep=2, expert_tp=1)}),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    sizes = {"max_position_embeddings": 512}
    tiny.write(folder / "qwen3", tiny.qwen3(**sizes))
    tiny.write(folder / "qwen2", tiny.qwen2(tie_word_embeddings=True, **sizes))
    tiny.write(folder / "moe", tiny.qwen3_moe(**sizes))
    return folder


def _planned_and_saved(folder: Path, runs: list[tuple[str, dict[str, Any]]]) -> Any:
    return [_one(folder / model, settings) for model, settings in runs]


def _one(path: Path, settings: dict[str, Any]) -> tuple[int, int]:
    learner = laboratory.make_learner(path, tokens_per_micro_batch=BUDGET, **settings)
    # Planning spreads tokens evenly over experts.
    learner.model.chunks[0].config.moe_router_force_load_balancing = True
    batch = Batch.from_sequences(
        tiny.random_sequences(LENGTHS), loss_mask=[[1.0] * n for n in LENGTHS]
    )
    with saved_by_autograd(learner) as count:
        learner.train_step(batch, SFTObjective())
    config, rank = learner.config, dist.get_rank()
    layout = Layout(config.parallel, dist.get_world_size())
    place = layout.place(rank)
    plan = plan_micro_batches(
        LENGTHS, layout.dp, BUDGET * layout.cp, multiple_of=layout.pp if layout.vpp > 1 else 1
    )[place.data]
    model = PlannedModel.read(path)
    activations = Activations.of(config, model, layout, learner.model.kernels)
    packs = [tuple(LENGTHS[i] for i in pack) for pack in plan]
    return saved_bytes(activations, layout, place, packs, model.layers)[0], count["peak"]


@pytest.mark.parametrize("ranks", RUNS)
def test_planned_activations_are_the_saved_ones(ranks, folder):
    torch.manual_seed(0)
    for rank, found in enumerate(run_ranks(ranks, _planned_and_saved, folder, RUNS[ranks])):
        for (model, settings), (planned, saved) in zip(RUNS[ranks], found, strict=True):
            assert planned == pytest.approx(saved, rel=BOUND), f"rank {rank}: {model} {settings}"

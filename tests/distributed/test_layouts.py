"""One answer whatever the layout: loss, metrics, every gradient, clipping, three steps' weights."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.losses import LossConfig, PolicyObjective, SFTObjective
from tests.distributed import laboratory, reference
from tests.distributed.ranks import run_ranks
from tests.models import tiny

TOLERANCE = 1e-5

OBJECTIVES = {
    "sft": SFTObjective(),
    "gppo": PolicyObjective(LossConfig(sft_alpha=reference.ALPHA)),
}


def layout(name: str, world_size: int = 1, **settings: Any) -> Any:
    """`tp=2` and the like are sizes, `overlap` is both overlaps; the rest are the policy's."""
    sizes = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "overlap_grad_reduce": "overlap_grad_reduce",
        "overlap_param_gather": "overlap_param_gather",
    }
    parallel = {sizes[key]: settings.pop(key) for key in list(settings) if key in sizes}
    return pytest.param(world_size, {**settings, "parallel": parallel}, id=name)


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
    layout("tp2-cp2", 4, tp=2, cp=2),
    layout("pp2-cp2", 4, pp=2, cp=2),
    layout("pp2-vpp2-cp2", 4, pp=2, vpp=2, cp=2),
    layout("tp2-pp2-cp2", 8, tp=2, pp=2, cp=2),
    layout("tp2-pp2-vpp2-dp2-overlap", 8, tp=2, pp=2, vpp=2, **OVERLAP),
    layout("tp2-cp2-dp2-all-packed", 8, tp=2, cp=2, tokens_per_micro_batch=10_000),
]
MODELS = {"untied": tiny.qwen3(), "tied": tiny.qwen3(tie_word_embeddings=True)}
CASES = list(itertools.product(MODELS, OBJECTIVES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, how Hugging Face trains them, and the metrics of one of our ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    for model, config in MODELS.items():
        tiny.write(folder / model, config)
    run_ranks(1, _write_references, folder)
    return folder


def _write_references(folder: Path) -> None:
    for model, objective in CASES:
        steps = reference.train(folder / model, reference.BATCHES, objective)
        metrics = [metrics for metrics, *_ in _train(folder, model, objective, {})]
        torch.save((steps, metrics), folder / f"{model}-{objective}.pt")


def _train(folder: Path, model: str, objective: str, settings: dict[str, Any]) -> Any:
    policy = laboratory.make_policy(folder / model, optimizer=reference.OPTIMIZER, **settings)
    return laboratory.train(policy, reference.BATCHES, OBJECTIVES[objective])


def deviations(folder: Path, settings: dict[str, Any]) -> list[str]:
    """What differs from the reference by more than the tolerance; on rank 0."""
    found = []
    for model, objective in CASES:
        steps, one_rank_metrics = torch.load(folder / f"{model}-{objective}.pt", weights_only=False)
        ours = _train(folder, model, objective, settings)
        for number, (step, one_rank) in enumerate(zip(steps, one_rank_metrics, strict=True)):
            metrics, gradients, weights = ours[number]
            where = f"{model} {objective} step {number}: "
            for name in metrics.keys() | one_rank.keys():
                expected = {"loss": step.loss, "grad_norm": step.grad_norm}.get(
                    name, one_rank[name]
                )
                if metrics[name] != pytest.approx(expected, rel=TOLERANCE, abs=1e-6):
                    found.append(f"{where}{name} {metrics[name]} instead of {expected}")
            if not gradients:  # not global rank 0
                continue
            assert gradients.keys() == step.gradients.keys() == weights.keys()
            for name, expected in step.gradients.items():
                if (error := tiny.relative_error(gradients[name], expected)) > TOLERANCE:
                    found.append(f"{where}gradient of {name} off by {error:.1e}")
            for name, expected in step.weights.items():
                if (error := tiny.relative_error(weights[name], expected)) > TOLERANCE:
                    found.append(f"{where}{name} off by {error:.1e}")
    return found


@pytest.mark.parametrize(("world_size", "settings"), LAYOUTS)
def test_every_layout_gives_hugging_faces_answer(world_size, settings, folder):
    for rank, found in enumerate(run_ranks(world_size, deviations, folder, settings)):
        assert not found, f"rank {rank}:\n" + "\n".join(found)

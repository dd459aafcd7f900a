"""The load-balancing loss of a mixture of experts, against Hugging Face's own function of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from klear_megatron.losses import SFTObjective
from klear_megatron.policy.packing import plan_micro_batches
from tests.distributed import laboratory, reference
from tests.distributed.ranks import run_ranks
from tests.models import tiny

COEFFICIENT = 0.3  # so large that the loss is nothing beside it
BATCH = reference.BATCHES[0]
TOLERANCE = 1e-5


def _hugging_face(checkpoint: Path, packs: list[list[int]]) -> tuple[float, float, Any]:
    """The loss, the balance, and every gradient of their weighted sum; whole sequences."""
    model = tiny.load(checkpoint)
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    sequences = reference.batch_sequences(BATCH)
    balance = torch.zeros(())
    for pack in packs:
        outputs = [
            model(torch.tensor([sequences[i]]), output_router_logits=True).router_logits
            for i in pack
        ]
        layers = [torch.cat(layer) for layer in zip(*outputs, strict=True)]
        share = sum(len(sequences[i]) for i in pack) / len(BATCH.tokens)
        for logits in layers:
            # Theirs is top_k times the Switch Transformer's, which is 1 in perfect balance.
            balance = balance + share * load_balancing_loss_func((logits,), experts, top_k) / top_k
    log_probs, entropy = tiny.hf_log_probs(model, sequences)
    loss = reference.sft_loss(log_probs, entropy, BATCH)
    (loss + COEFFICIENT * balance).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), balance.item() / len(layers), reference.as_in_files(gradients)


def _step(checkpoint: Path, settings: dict[str, Any]) -> tuple[dict[str, float], Any]:
    learner = laboratory.make_learner(checkpoint, moe_aux_loss_coeff=COEFFICIENT, **settings)
    return laboratory.train(learner, [BATCH], SFTObjective())[0]


def _off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    errors = {name: tiny.relative_error(ours[name], theirs[name]) for name in theirs}
    return {name: error for name, error in errors.items() if error > TOLERANCE}


def _layout(**sizes: int) -> dict[str, int]:
    return {f"{name}_parallel_size": size for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("world_size", "parallel", "settings"),
    [
        (1, {}, {"tokens_per_micro_batch": 10_000}),
        (1, {}, {"recompute_granularity": "full"}),
        (1, {}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
        (2, {}, {}),
        (2, {}, {"tokens_per_micro_batch": 1}),
        (2, _layout(tensor_model=2), {}),
        (2, _layout(expert_model=2), {}),
        (2, _layout(context=2), {}),
        (4, _layout(tensor_model=2, pipeline_model=2), {"recompute_granularity": "full"}),
        (4, _layout(pipeline_model=2, virtual_pipeline_model=2), {}),
        (4, _layout(tensor_model=2, expert_model=2, expert_tensor=2), {}),
        (4, _layout(tensor_model=2, context=2, expert_model=4, expert_tensor=1), {}),
    ],
)
def test_any_layout_gives_hugging_faces_gradients(world_size, parallel, settings, folder):
    settings = {"parallel": parallel, "tokens_per_micro_batch": 64, **settings}
    cp = parallel.get("context_parallel_size", 1)
    pp = parallel.get("pipeline_model_parallel_size", 1)
    dp = world_size // cp // pp // parallel.get("tensor_model_parallel_size", 1)
    plan = plan_micro_batches(
        BATCH.lengths,
        dp,
        settings["tokens_per_micro_batch"] * cp,
        multiple_of=pp if "virtual_pipeline_model_parallel_size" in parallel else 1,
    )
    packs = [pack for rank in plan for pack in rank if pack]
    loss, balance, theirs = _hugging_face(folder / "moe", packs)
    metrics, ours = run_ranks(world_size, _step, folder / "moe", settings)[0]
    assert metrics["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert metrics["load_balancing_loss"] == pytest.approx(balance, rel=TOLERANCE)
    assert not _off(ours, theirs)

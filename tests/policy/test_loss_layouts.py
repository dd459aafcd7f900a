"""Every loss with every aggregation is the same in every layout.

The mini-batch's log-probabilities are made beforehand. The trainer's own planner, packs and cut
over context-parallel ranks give each rank its tokens; the parts of all ranks have to add up to the
objective of the whole. Tensor and pipeline parallelism are not seen by a loss, except through
padding and the number of packs. tests/distributed has whole models in all layouts.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from klear_megatron.losses import (
    CustomLossConfig,
    LossConfig,
    LossInputs,
    PolicyObjective,
    Result,
    TokenLoss,
)
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.learner import evaluate_objective
from klear_megatron.policy.micro_batches import build_micro_batch
from klear_megatron.policy.packing import plan_micro_batches
from tests.losses.mini_batch import LENGTHS, SEQUENCES, TOKENS, whole
from tests.losses.test_every_loss import AGGREGATIONS, CONFIGS, configured, mini_batch

ALL_TERMS = {
    "sft_alpha": 0.1,
    "entropy_coeff": 0.01,
    "kl": {"coeff": 0.1},
    "tis_clip": 1.2,
    "token_mask": (0.3, 3.0),
    "sequence_mask": (0.8, 1.3),
}
# (data parallel, context parallel, tokens per micro-batch and CP rank, padding, packs per rank)
LAYOUTS = {
    "all packed": (1, 1, 1000, 1, 1),
    "no packing": (1, 1, 1, 1, 1),
    "tp2": (1, 1, 20, 2, 1),
    "pp2-vpp2": (1, 1, 20, 1, 2),
    "dp2": (2, 1, 20, 1, 1),
    "dp8, more ranks than sequences": (8, 1, 20, 1, 1),
    "cp2": (1, 2, 10, 4, 1),
    "cp2, no packing": (1, 2, 1, 4, 1),
    "cp4": (1, 4, 1000, 8, 1),
    "tp2-cp2-dp2": (2, 2, 10, 8, 1),
}


def own(inputs: LossInputs) -> TokenLoss:
    """Uses everything that a loss of the user's own is given."""
    assert inputs.rollout_log_probs is not None
    assert inputs.ref_log_probs is not None
    assert inputs.old_entropy is not None
    ratio = (inputs.log_probs - inputs.old_log_probs).exp()
    drift = inputs.sequences.means(inputs.log_probs - inputs.ref_log_probs, inputs.mask)
    lengths = inputs.sequences.spread(inputs.sequences.sums(inputs.mask))
    surprise = (inputs.entropy - inputs.old_entropy) * inputs.rollout_log_probs
    values = -ratio * inputs.advantages * (1 + inputs.sequences.spread(drift))
    return TokenLoss(values + surprise / (1 + lengths), {"far": (ratio.detach() - 1).abs() > 0.5})


class ContextParallel:
    """Sums tensors over the ranks of one micro-batch, which are threads here."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._parts: list[Tensor] = []

    def sum(self, mine: Tensor) -> Tensor:
        self._parts.append(mine)
        self._barrier.wait()
        total = torch.stack(self._parts).sum(0)
        if self._barrier.wait() == 0:
            self._parts = []
        self._barrier.wait()
        return total


def parts(
    objective: PolicyObjective,
    log_probs: Tensor,
    entropy: Tensor,
    fields: dict[str, Tensor],
    layout: tuple[int, int, int, int, int],
) -> list[Result]:
    """What each rank computes of each of its packs."""
    data_parallel, cp, tokens, align, multiple = layout
    batch = Batch(torch.zeros(TOKENS, dtype=torch.int32), LENGTHS)
    denominators = objective.denominators(fields, SEQUENCES)

    def part(pack: list[int], together: ContextParallel, rank: int) -> Result:
        micro = build_micro_batch(batch, pack, align=align, cp_rank=rank, cp_size=cp)
        output = torch.stack([log_probs, entropy])[:, micro.targets]
        return evaluate_objective(objective, micro, output, fields, denominators, together.sum)

    plan = plan_micro_batches(LENGTHS, data_parallel, tokens * cp, multiple)
    with ThreadPoolExecutor(cp) as pool:
        return [
            result
            for rank in plan
            for pack in rank
            for result in pool.map(partial(part, pack, ContextParallel(cp)), range(cp))
        ]


LOSSES: list[LossConfig] = [*CONFIGS, CustomLossConfig(name=f"{__name__}:own")]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda one: one.name.split(":")[-1])
def test_the_ranks_parts_add_up_to_the_whole_in_every_layout(loss, aggregation):
    log_probs, entropy, fields = mini_batch()
    entropy.requires_grad_()
    fields["ref_log_probs"] = log_probs.detach().roll(1)
    # As in a run: nothing predicts the first token of a sequence.
    fields["loss_mask"][torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)] = 0
    config = configured(loss, aggregation)
    objective = PolicyObjective(type(config).model_validate(config.model_dump() | ALL_TERMS))
    together = whole(objective, log_probs, entropy, fields)
    expected = torch.autograd.grad(together.loss, (log_probs, entropy))
    assert all(gradient.any() for gradient in expected)
    for name, layout in LAYOUTS.items():
        results = parts(objective, log_probs, entropy, fields, layout)
        loss_value = sum(result.loss for result in results)
        gradients = torch.autograd.grad(loss_value, (log_probs, entropy))
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14, msg=name)
        close(loss_value, together.loss)
        close(gradients, expected)
        for metric, value in together.sums.items():
            close(sum(result.sums[metric] for result in results), value, msg=f"{name}: {metric}")

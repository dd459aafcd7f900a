"""A random mini-batch in float64, and an objective's result on it."""

import torch
from torch import Tensor

from klear_megatron.losses import Objective, Result, Sequences

LENGTHS = [9, 1, 17, 13]
TOKENS = sum(LENGTHS)
SEQUENCES = Sequences.whole(LENGTHS)


def make_fields(seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """log-probabilities (a leaf), entropies and the fields of a mini-batch, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(TOKENS, generator=generator, dtype=torch.float64)

    log_probs = -random().abs()
    fields = {
        "old_log_probs": log_probs + random(0.4),
        "rollout_log_probs": log_probs + random(0.4),
        "advantages": random(),
        "loss_mask": (random() > -0.5).double(),
        "correct": (random() > 0).double(),
    }
    return log_probs.requires_grad_(), random().abs(), fields


def whole(
    objective: Objective, log_probs: Tensor, entropy: Tensor, fields: dict[str, Tensor]
) -> Result:
    """The objective of a mini-batch in one part."""
    denominators = objective.denominators(fields, SEQUENCES)
    return objective(log_probs, entropy, fields, SEQUENCES, denominators)

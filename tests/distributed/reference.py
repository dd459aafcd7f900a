"""What every layout has to reproduce: plain Hugging Face autograd and torch's AdamW.

Nothing here knows of Megatron, micro-batches or ranks: whole sequences, one after another.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klear_megatron.policy.batch import Batch
from tests.models import tiny

ALPHA, CLIP_LOW, CLIP_HIGH = 0.1, 0.2, 0.28
OPTIMIZER = {
    "lr": 3e-3,  # with three times as much, rounding errors of one step are 1e-5 two steps later
    "weight_decay": 0.1,
    "clip_grad": 0.5,
    # Adam divides gradients by their own size: where they are almost zero, by rounding errors.
    "adam_eps": 1e-4,
}


@dataclass
class Step:
    """One optimizer step: what it started from and how it ended."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def sft_loss(log_probs: Tensor, entropy: Tensor, batch: Batch) -> Tensor:
    mask = batch.fields["loss_mask"]
    return -(log_probs * mask).sum() / mask.sum()


def gppo_loss(log_probs: Tensor, entropy: Tensor, batch: Batch) -> Tensor:
    """Eq. 7, 11, 13, 14 of the paper as they stand there."""
    mask, correct, old, advantage = (
        batch.fields[name] for name in ("loss_mask", "correct", "old_log_probs", "advantages")
    )
    ratio = (log_probs - old).exp()
    sg = ratio.detach()
    clipped = torch.where(sg < 1 - CLIP_LOW, (1 - CLIP_LOW) / sg * ratio, ratio)
    clipped = torch.where(sg > 1 + CLIP_HIGH, (1 + CLIP_HIGH) / sg * ratio, clipped)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    sft = -(log_probs * mask * correct).sum() / (mask * correct).sum().clamp(min=1)
    return -(surrogate * mask).sum() / mask.sum() + ALPHA * sft


TOKEN_MASK, SEQUENCE_MASK = (0.6, 1.8), (0.94, 1.06)
LOG_CLIP, ENTROPY_COEFF, KL_COEFF = 1.0, 0.05, 0.02


def sequence_wide_loss(log_probs: Tensor, entropy: Tensor, batch: Batch) -> Tensor:
    """GMPO (arXiv 2507.20673, Eq. 4) on the tokens and responses that masks leave, with an entropy
    bonus, a KL penalty (k2) and the SFT term: one response after another."""
    names = ("loss_mask", "correct", "old_log_probs", "advantages")
    fields = [batch.fields[name] for name in (*names, "rollout_log_probs", "ref_log_probs")]
    rows = zip(*(one.split(batch.lengths) for one in (log_probs, entropy, *fields)), strict=True)
    responses, imitated = [], []
    for new, spread, mask, correct, old, advantage, rollout, ref in rows:
        drawn = mask > 0
        mismatch = (old - rollout).exp()
        kept = drawn & (mismatch >= TOKEN_MASK[0]) & (mismatch <= TOKEN_MASK[1])
        of_response = (old - rollout)[drawn].mean().exp()
        if not (kept.any() and SEQUENCE_MASK[0] <= of_response <= SEQUENCE_MASK[1]):
            continue
        log_ratio, better = (new - old)[kept], bool(advantage[0] > 0)
        bounded = log_ratio.clamp(max=LOG_CLIP) if better else log_ratio.clamp(min=-LOG_CLIP)
        kl = ((new - ref)[kept] ** 2 / 2).mean()
        loss = -advantage[0] * bounded.mean().exp()
        responses.append(loss - ENTROPY_COEFF * spread[kept].mean() + KL_COEFF * kl)
        imitated.append(new[kept & (correct > 0)])
    all_imitated = torch.cat(imitated)
    sft = -all_imitated.sum() / max(len(all_imitated), 1)
    return torch.stack(responses).mean() + ALPHA * sft


LOSSES = {"sft": sft_loss, "gppo": gppo_loss, "sequence_wide": sequence_wide_loss}


def train(checkpoint: Path, batches: list[Batch], loss_name: str) -> list[Step]:
    """One optimizer step per batch."""
    model = tiny.load(checkpoint)
    parameters = list(model.parameters())
    groups = [  # norms and biases are not decayed
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIMIZER["lr"], eps=OPTIMIZER["adam_eps"])
    steps = []
    for batch in batches:
        log_probs, entropy = tiny.hf_log_probs(model, batch_sequences(batch))
        loss = LOSSES[loss_name](log_probs, entropy, batch)
        loss.backward()
        gradients = as_in_files({n: p.grad.clone() for n, p in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["clip_grad"])
        adam.step()
        adam.zero_grad()
        weights = as_in_files({n: p.detach().clone() for n, p in model.named_parameters()})
        steps.append(Step(loss.item(), norm.item(), gradients, weights))
    return steps


def as_in_files(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face stacks experts in memory; in files each has tensors of its own."""
    named = {}
    for name, tensor in tensors.items():
        prefix, experts, kind = name.rpartition(".experts.")
        if not experts:
            named[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
            for part, piece in zip(parts, expert.chunk(len(parts)), strict=True):
                named[f"{prefix}.experts.{number}.{part}.weight"] = piece
    return named


def batch_sequences(batch: Batch) -> list[list[int]]:
    return [row.tolist() for row in batch.tokens.split(batch.lengths)]


def make_batch(lengths: list[int], correct: list[bool], seed: int) -> Batch:
    """Responses after prompts of up to three tokens, drawn from a policy that was another."""
    generator = torch.Generator().manual_seed(seed)
    sequences = tiny.random_sequences(lengths, seed)
    prompts = [min(3, length) for length in lengths]
    advantages = torch.randn(len(lengths), generator=generator).tolist()
    old = [-6 + 2 * torch.randn(length, generator=generator) for length in lengths]

    def per_token(values: list[float]) -> list[list[float]]:
        return [[value] * length for value, length in zip(values, lengths, strict=True)]

    def near(row: Tensor, distance: float) -> list[float]:
        return (row + distance * torch.randn(len(row), generator=generator)).tolist()

    return Batch.from_sequences(
        sequences,
        loss_mask=[[0.0] * p + [1.0] * (n - p) for p, n in zip(prompts, lengths, strict=True)],
        advantages=per_token(advantages),
        correct=per_token([float(c) for c in correct]),
        old_log_probs=[row.tolist() for row in old],
        rollout_log_probs=[near(row, 0.3) for row in old],
        ref_log_probs=[near(row, 1.0) for row in old],
    )


BATCHES = [
    # Lengths and correct responses unequal over ranks; a pack over any budget but the largest.
    make_batch(
        [7, 60, 2, 33, 1, 90, 18, 41], [True, False, False, True, True, False, True, True], 1
    ),
    # Fewer sequences than data-parallel ranks may be: some ranks have padding alone.
    make_batch([50, 12, 5], [False, True, False], 2),
    # Nothing correct at all.
    make_batch([20, 20, 20, 20, 20, 20, 20, 21, 3], [False] * 9, 3),
]

"""What a policy loss gets and gives, for T tokens of whole or partial sequences."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Fields = Mapping[str, Tensor]
"""name -> [T] float32, aligned with the log-probabilities."""


def _unchanged(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True)
class Sequences:
    """Which sequence each of T tokens belongs to, and sums over whole sequences.

    With context parallelism, a rank holds only some tokens of a sequence. Sums and means cover all
    of them, wherever they are, and are differentiable. They communicate, so every rank has to ask
    for the same ones in the same order.
    """

    ids: Tensor
    """[T] int64, from 0 to `count` - 1."""
    count: int
    """S. The same on all ranks that share the sequences, whichever tokens they hold."""
    over_ranks: Callable[[Tensor], Tensor] = _unchanged
    """Sums a tensor, differentiably, over the ranks that share the sequences."""

    @classmethod
    def whole(cls, lengths: list[int]) -> "Sequences":
        """All tokens of sequences that stand one after another."""
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        return cls(ids, len(lengths))

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each sequence's tokens: [..., T] floating -> [..., S]."""
        zeros = values.new_zeros(*values.shape[:-1], self.count)
        return self.over_ranks(zeros.index_add(-1, self.ids, values))

    def means(self, values: Tensor, mask: Tensor) -> Tensor:
        """The mean over each sequence's tokens where `mask` is 1: [T], [T] -> [S].

        The mean of a sequence without such tokens is 0.
        """
        total, number = self.sums(torch.stack([values * mask, mask.to(values.dtype)]))
        return total / number.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """Gives every token the value of its sequence: [S] -> [T]."""
        return values[self.ids]


@dataclass(frozen=True)
class LossInputs:
    """What a policy loss sees of T tokens; all but `sequences` are [T]."""

    log_probs: Tensor
    """The trained policy's, differentiable. Nothing else here has a gradient."""
    old_log_probs: Tensor
    """Log-probabilities of the policy before its first update on these responses."""
    advantages: Tensor
    mask: Tensor
    """1 where the token is trained, 0 elsewhere."""
    sequences: Sequences
    """A sequence is a prompt and one response to it."""
    entropy: Tensor
    """The trained policy's, over the vocabulary, in nats."""
    rollout_log_probs: Tensor | None = None
    """Log-probabilities of the server that drew the tokens; finite. This and the fields below are
    None unless the batch has a field of that name."""
    ref_log_probs: Tensor | None = None
    """Log-probabilities of a reference policy."""
    old_entropy: Tensor | None = None
    """The entropy before the first update on these responses."""


@dataclass(frozen=True)
class TokenLoss:
    """What a policy loss makes of the tokens."""

    values: Tensor
    """[T] What is aggregated over the trained tokens and minimised."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [T] without gradient, numbers or booleans; reported as means over trained tokens."""

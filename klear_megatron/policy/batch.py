"""Sequences as one flat row of tokens, and the values that a loss needs for each token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences with N tokens in total, one after another, on the CPU. The same on every rank.

    `fields[name][t]` belongs to token t: the loss sees it together with the log-probability of
    token t given the tokens before it. The first token of a sequence has no log-probability.
    """

    tokens: Tensor
    """[N] int64."""
    lengths: list[int]
    """[B] tokens per sequence, prompt and response together."""
    fields: Mapping[str, Tensor]
    """name -> [N] float32."""

    def __post_init__(self) -> None:
        for name, values in {"tokens": self.tokens, **self.fields}.items():
            if values.shape != (sum(self.lengths),):
                raise ValueError(f"{name}: {tuple(values.shape)}, not ({sum(self.lengths)},)")

    @classmethod
    def from_sequences(
        cls, tokens: Sequence[Sequence[int]], **fields: Sequence[Sequence[float]]
    ) -> "Batch":
        """Makes a batch from a list of tokens per sequence and a list per sequence and field."""

        def flat(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return _concatenate([torch.as_tensor(row, dtype=dtype) for row in rows], dtype)

        return cls(
            flat(tokens, torch.int64),
            [len(row) for row in tokens],
            {name: flat(rows, torch.float32) for name, rows in fields.items()},
        )

    @classmethod
    def concatenate(cls, batches: Sequence["Batch"]) -> "Batch":
        """All sequences of these batches in order; the batches must have the same fields."""
        return cls(
            torch.cat([batch.tokens for batch in batches]),
            [length for batch in batches for length in batch.lengths],
            {
                name: torch.cat([batch.fields[name] for batch in batches])
                for name in batches[0].fields
            },
        )

    def select(self, sequences: Sequence[int]) -> "Batch":
        """A batch of the given sequences, in the given order."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        rows = _concatenate(
            [torch.arange(starts[i], starts[i + 1]) for i in sequences], torch.int64
        )
        return Batch(
            self.tokens[rows],
            [self.lengths[i] for i in sequences],
            {name: values[rows] for name, values in self.fields.items()},
        )

    def with_fields(self, **fields: Tensor) -> "Batch":
        """The same sequences, with these fields added or replaced."""
        return Batch(self.tokens, self.lengths, {**self.fields, **fields})


def _concatenate(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *rows])

"""Sequences as one flat row of tokens, and the values that a loss needs for each token."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences with N tokens in total, one after another, on the CPU. The same on every rank.

    `fields[name][t]` belongs to token t: the loss sees it together with the log-probability of
    token t given the tokens before it. The first token of a sequence has no log-probability.
    """

    tokens: Tensor
    """[N] int32."""
    lengths: list[int]
    """[B] tokens per sequence, prompt and response together."""
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [N] float32."""
    per_response: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [B] float32, the value of all tokens of a response; its prompt's tokens have 0."""
    prompt_lengths: list[int] = field(default_factory=list)
    """[B]; may be left out if there is nothing in `per_response`."""

    def __post_init__(self) -> None:
        for shape, values in (
            ((sum(self.lengths),), {"tokens": self.tokens, **self.per_token}),
            ((len(self.lengths),), self.per_response),
        ):
            for name, value in values.items():
                if value.shape != shape:
                    raise ValueError(f"{name}: {tuple(value.shape)}, not {shape}")
        if self.per_response and len(self.prompt_lengths) != len(self.lengths):
            raise ValueError(f"{len(self.prompt_lengths)} prompt lengths, not {len(self.lengths)}")

    @classmethod
    def from_sequences(
        cls, tokens: Sequence[Sequence[int]], **fields: Sequence[Sequence[float]]
    ) -> "Batch":
        """Makes a batch from a list of tokens per sequence and a list per sequence and field."""

        def flat(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return _concatenate([torch.as_tensor(row, dtype=dtype) for row in rows], dtype)

        return cls(
            flat(tokens, torch.int32),
            [len(row) for row in tokens],
            {name: flat(rows, torch.float32) for name, rows in fields.items()},
        )

    @property
    def fields(self) -> Mapping[str, Tensor]:
        """name -> [N] float32. A field of `per_response` is spread over the tokens each time that
        it is asked for, so that it takes no memory between."""
        return _Fields(self)

    def select(self, sequences: Sequence[int]) -> "Batch":
        """A batch of the given sequences, in the given order."""
        rows = self.token_places(sequences)
        return Batch(
            self.tokens[rows],
            [self.lengths[i] for i in sequences],
            {name: values[rows] for name, values in self.per_token.items()},
            {name: values[list(sequences)] for name, values in self.per_response.items()},
            [self.prompt_lengths[i] for i in sequences] if self.prompt_lengths else [],
        )

    def token_places(self, sequences: Sequence[int]) -> Tensor:
        """Where the tokens of the given sequences are in the flat row, in the given order."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        places = [torch.arange(starts[i], starts[i + 1]) for i in sequences]
        return _concatenate(places, torch.int64)

    def with_fields(self, **fields: Tensor) -> "Batch":
        """The same sequences, with these fields, [N] each, added or replaced."""
        per_token = {**self.per_token, **fields}
        return Batch(self.tokens, self.lengths, per_token, self.per_response, self.prompt_lengths)


class _Fields(Mapping[str, Tensor]):
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __getitem__(self, name: str) -> Tensor:
        batch = self._batch
        if name in batch.per_token:
            return batch.per_token[name]
        values = torch.stack([torch.zeros(len(batch.lengths)), batch.per_response[name]], 1)
        prompts, lengths = np.array(batch.prompt_lengths, int), np.array(batch.lengths, int)
        counts = np.stack([prompts, lengths - prompts], 1)
        return torch.from_numpy(np.repeat(values.numpy().ravel(), counts.ravel()))

    def __iter__(self) -> Iterator[str]:
        return iter({**self._batch.per_response, **self._batch.per_token})

    def __len__(self) -> int:
        return len(list(iter(self)))


def _concatenate(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *rows])

"""How one Megatron parameter relates to Hugging Face tensors and to its tensor-parallel shards.

A mapping is two pairs of inverse functions on full (unsharded) tensors:
`merge`/`split` between the Hugging Face tensors and the full Megatron tensor, and
`shard`/`unshard` between the full Megatron tensor and its tensor-parallel pieces.
All of them move numbers and never compute with them, so every round trip is bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ParamMapping:
    """One Hugging Face tensor, kept as it is and replicated over tensor-parallel ranks."""

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors -> full Megatron tensor."""
        (part,) = parts
        return part

    def split(self, full: Tensor) -> list[Tensor]:
        """Full Megatron tensor -> Hugging Face tensors."""
        return [full]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The piece of tensor-parallel rank `rank` of `size`."""
        return full

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """All pieces, in rank order -> full Megatron tensor."""
        return shards[0]


Replicated = ParamMapping


@dataclass(frozen=True, kw_only=True)
class Sharded(ParamMapping):
    """One Hugging Face tensor cut along `dim`: 0 is column-parallel, 1 row-parallel."""

    dim: int = 0

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, self.dim)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(shards), self.dim)


Row = Sharded(dim=1)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Sharded):
    """Embedding or output weight [vocabulary, hidden], zero-padded so that the ranks share it."""

    size: int
    padded_size: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        (part,) = parts
        if self.padded_size == self.size:
            return part
        return torch.nn.functional.pad(part, (0, 0, 0, self.padded_size - self.size))

    def split(self, full: Tensor) -> list[Tensor]:
        return [full[: self.size]]


@dataclass(frozen=True, kw_only=True)
class QKV(Sharded):
    """q, k and v projections (weights or biases), interleaved per query group.

    Megatron orders the rows of `linear_qkv` as, for each group: the group's query heads, its key
    head, its value head; so that cutting along dim 0 gives each rank whole groups.
    """

    groups: int
    heads_per_group: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    def split(self, full: Tensor) -> list[Tensor]:
        head_dim = full.shape[0] // (self.groups * (self.heads_per_group + 2))
        grouped = full.reshape(self.groups, -1, *full.shape[1:])
        rows = [self.heads_per_group * head_dim, head_dim, head_dim]
        return [part.flatten(0, 1) for part in grouped.split(rows, 1)]


@dataclass(frozen=True)
class GatedMLP(ParamMapping):
    """gate and up projections stacked; each rank holds its piece of both, again stacked."""

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts), 0)

    def split(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2, 0))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        import torch

        return torch.cat([half.chunk(size, 0)[rank] for half in full.chunk(2, 0)], 0)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        import torch

        halves = [shard.chunk(2, 0) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], 0)

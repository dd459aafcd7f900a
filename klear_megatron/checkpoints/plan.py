"""The plan of a conversion, complete before the conversion begins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klear_megatron.checkpoints.dtypes import dtype_name
from klear_megatron.errors import UserError
from klear_megatron.models import Weight

SHARD_BYTES = 5 * 10**9
"""Default size of the largest output file."""

Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


@dataclass(frozen=True)
class Move:
    """The conversion of one row of the architecture's table."""

    row: Weight
    dtype: torch.dtype
    """The dtype of the output."""

    @property
    def specs(self) -> list[Spec]:
        """The row's Hugging Face tensors."""
        return [(name, self.dtype, shape) for name, shape in self.row.sources.items()]

    @property
    def nbytes(self) -> int:
        """Size of the row's Hugging Face tensors; Megatron's padded vocabulary is larger."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self.specs)

    def checked(self, tensor: Tensor, path: Path) -> Tensor:
        """Converts a tensor of the row to the output's dtype.

        Args:
            path: the tensor's source, for messages.

        Raises:
            UserError: a value is not finite, or too large for the dtype.
        """
        out = tensor.to(self.dtype)
        if not _is_finite(out):
            name = f"{' / '.join(self.row.sources)} ({self.row.name})"
            if _is_finite(tensor):
                raise UserError(
                    f"{path}: {name} has values too large for {dtype_name(self.dtype)}; "
                    "choose another dtype"
                )
            raise UserError(f"{path}: {name} has NaN or infinite values")
        return out


def _is_finite(tensor: Tensor) -> bool:
    # The extremes are NaN if any value is. This takes one pass and no tensor of booleans.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def in_shards(moves: Sequence[Move], shard_bytes: int) -> list[list[Move]]:
    """Groups the moves, in order, by at most `shard_bytes`; a larger one gets its own group."""
    shards: list[list[Move]] = [[]]
    size = 0
    for move in moves:
        if shards[-1] and size + move.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(move)
        size += move.nbytes
    return shards


def describe(files: Mapping[str, Sequence[Move]], *, to_hf: bool) -> Iterator[str]:
    """The plan as lines: each tensor's source, target, shape, dtype and bytes; then the totals."""
    for file, moves in files.items():
        yield f"{file}: {sum(move.nbytes for move in moves):,} bytes"
        for move in moves:
            for name, dtype, shape in move.specs:
                ends = (move.row.name, name) if to_hf else (name, move.row.name)
                nbytes = torch.Size(shape).numel() * dtype.itemsize
                what = f"{list(shape)} {dtype_name(dtype)}, {nbytes:,} bytes"
                yield f"  {ends[0]} -> {ends[1]}: {what}"
    moves = [move for shard in files.values() for move in shard]
    total = sum(move.nbytes for move in moves)
    yield f"{sum(len(move.specs) for move in moves)} tensors, {len(files)} files, {total:,} bytes"

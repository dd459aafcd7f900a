"""Compares two checkpoints, each of Hugging Face or Megatron, tensor by tensor."""

from collections.abc import KeysView
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from klear_megatron.checkpoints.dtypes import dtype_name
from klear_megatron.checkpoints.hf_reader import HFCheckpoint
from klear_megatron.checkpoints.megatron_folder import is_megatron_checkpoint
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.checkpoints.model_folder import ModelFolder, config_of
from klear_megatron.models import Weight
from klear_megatron.observability import Progress


class Weights:
    """The weights of a checkpoint of either kind, by Hugging Face name, read one at a time.

    Raises:
        UserError: it is not a checkpoint, or its config and weights do not match.
    """

    def __init__(self, path: Path) -> None:
        self._source: MegatronCheckpoint | HFCheckpoint
        if is_megatron_checkpoint(path):
            self._source = MegatronCheckpoint(path)
            with config_of(self._source) as folder:
                table = self._source.table(folder.config)
        else:
            table = ModelFolder(path).table()
            self._source = HFCheckpoint(path)
            self._source.check(table)
        self._rows = {name: row for row in table for name in row.sources}
        self._last: tuple[Weight, dict[str, Tensor]] | None = None

    @property
    def names(self) -> KeysView[str]:
        return self._rows.keys()

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor by its Hugging Face name.

        Raises:
            UserError: the tensor is corrupt.
        """
        if isinstance(self._source, HFCheckpoint):
            return self._source.tensor(name)
        # The tensors of a row come one after another, so they are read together.
        row = self._rows[name]
        if self._last is None or self._last[0] is not row:
            parts = row.mapping.split(self._source.tensor(row))
            self._last = row, dict(zip(row.sources, parts, strict=True))
        return self._last[1][name]


class Comparison(NamedTuple):
    """What two checkpoints have in common and where they differ."""

    tensors: int
    """Number of tensors that are in either."""
    differing: dict[str, str]
    """Hugging Face name -> what differs, for each tensor that is not the same in every bit."""


def compare_weights(a: Path, b: Path) -> Comparison:
    """Reads both, tensor by tensor.

    Raises:
        UserError: one of them cannot be read.
    """
    ours, theirs = Weights(a), Weights(b)
    names = list(dict.fromkeys([*ours.names, *theirs.names]))
    differing: dict[str, str] = {}
    with Progress("compare", len(names), keep=False) as progress:
        for name in names:
            if name not in theirs.names:
                differing[name] = f"only in {a}"
            elif name not in ours.names:
                differing[name] = f"only in {b}"
            elif difference := _difference(ours.tensor(name), theirs.tensor(name)):
                differing[name] = difference
            progress.advance()
    return Comparison(len(names), differing)


def _difference(a: Tensor, b: Tensor) -> str | None:
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)}"
    if a.dtype == b.dtype and _bits_equal(a, b):
        return None
    dtypes = " and ".join(dict.fromkeys(dtype_name(x.dtype) for x in (a, b)))
    largest = (a.double() - b.double()).abs().max().item()
    return f"{dtypes}, largest difference {largest:.3g}"


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    # Compare as integers: NaN equals itself, and 0 differs from -0.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))

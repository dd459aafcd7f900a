"""The two conversions. Both move one row of the architecture's table after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from klear_megatron.conversion.dtypes import DTYPES, dtype_name
from klear_megatron.conversion.hf_writer import (
    Spec,
    set_config_dtype,
    shard_names,
    write_header,
    write_index,
    write_tensor,
)
from klear_megatron.conversion.megatron_reader import MegatronCheckpoint
from klear_megatron.conversion.megatron_writer import Placed, write_metadata, write_row
from klear_megatron.conversion.progress import Progress
from klear_megatron.conversion.staging import Staging
from klear_megatron.errors import UserError
from klear_megatron.models import Weight, get_architecture, padded_vocab_size
from klear_megatron.models.hf_checkpoint import HFCheckpoint, copy_companions, read_config

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Move:
    """One row of the table on its way: what is read, and as what it is written."""

    row: Weight
    dtype: torch.dtype
    """Of the output."""

    @property
    def specs(self) -> list[Spec]:
        """The row's Hugging Face tensors."""
        return [(name, self.dtype, shape) for name, shape in self.row.sources.items()]

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * self.dtype.itemsize for _, _, shape in self.specs)


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    resume: bool = False,
) -> None:
    """Writes a training checkpoint's weights as a Hugging Face folder.

    Any layout; neither GPU nor ranks are needed, and memory holds one tensor at a time.

    Args:
        checkpoint: folder of a Megatron distributed checkpoint with the Hugging Face config and
            tokenizer of its model under `hf/`, as `Policy.save` writes it.
        dtype: "float32", "bfloat16" or "float16"; that of the checkpoint by default.
        shard_bytes: largest safetensors file, except where one row alone is larger.

    Raises:
        UserError: weights that do not fit the config, are not finite or are corrupt; no space.
    """
    source = MegatronCheckpoint(checkpoint)
    companions = checkpoint / "hf"
    hf = read_config(companions)
    table = list(get_architecture(hf).weights(hf, source.padded_vocab_size))
    source.check(table)
    moves = [Move(row, DTYPES[dtype] if dtype else source.dtype(row)) for row in table]
    shards = _shards(moves, shard_bytes)
    names = shard_names(len(shards))
    if dry_run:
        _print_plan(moves, dict(zip(names, shards, strict=True)), to_hf=True)
        return

    staging = _staging(checkpoint, out, moves, shard_bytes, resume=resume)
    with Progress(sum(m.nbytes for m in moves)) as progress:

        def write(shard: Sequence[Move], file: BinaryIO) -> None:
            write_header(file, [spec for move in shard for spec in move.specs])
            for move in shard:
                for tensor in move.row.layout.split(source.tensor(move.row)):
                    write_tensor(file, _checked(tensor, move, checkpoint))
                progress.advance(move.nbytes)

        _write_shards(staging, names, shards, write, progress)
    copy_companions(companions, staging.partial)
    set_config_dtype(staging.partial, (m.dtype for m in moves))
    if len(shards) > 1:
        weight_map = {
            name: file
            for file, shard in zip(names, shards, strict=True)
            for move in shard
            for name in move.row.sources
        }
        write_index(staging.partial, weight_map, sum(m.nbytes for m in moves))
    staging.commit()
    progress.summary(out)


def hf_to_megatron(
    hf_dir: Path,
    out: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    resume: bool = False,
) -> None:
    """Writes a Hugging Face folder's weights as a Megatron distributed checkpoint, for any layout.

    Memory holds one row of the table at a time. The config and the tokenizer come along, under
    `hf/`.

    Args: as of `megatron_to_hf`.

    Raises:
        UserError: weights that do not fit the config, are not finite or are corrupt; no space.
    """
    hf = read_config(hf_dir)
    table = list(get_architecture(hf).weights(hf, padded_vocab_size(hf.vocab_size, 1)))
    source = HFCheckpoint(hf_dir)
    source.check(table)
    moves = [Move(row, DTYPES[dtype] if dtype else _source_dtype(source, row)) for row in table]
    shards = _shards(moves, shard_bytes)
    names = [f"__0_{i}.distcp" for i in range(len(shards))]
    if dry_run:
        _print_plan(moves, dict(zip(names, shards, strict=True)), to_hf=False)
        return

    staging = _staging(hf_dir, out, moves, shard_bytes, resume=resume)
    with Progress(sum(m.nbytes for m in moves)) as progress:

        def write(shard: Sequence[Move], file: BinaryIO) -> list[dict[str, Any]]:
            placed = []
            for move in shard:
                parts = [source.tensor(name) for name in move.row.sources]
                full = _checked(move.row.layout.merge(parts), move, hf_dir)
                placed.append(asdict(write_row(file, move.row, full)))
                progress.advance(move.nbytes)
            return placed

        receipts = _write_shards(staging, names, shards, write, progress)
    (staging.partial / "hf").mkdir(exist_ok=True)
    copy_companions(hf_dir, staging.partial / "hf")
    set_config_dtype(staging.partial / "hf", (m.dtype for m in moves))
    placed = {
        place["name"]: (file, Placed(**place))
        for file, receipt in zip(names, receipts, strict=True)
        for place in receipt
    }
    write_metadata(staging.partial, table, placed, {m.row.name: m.dtype for m in moves})
    staging.commit()
    progress.summary(out)


def _source_dtype(source: HFCheckpoint, row: Weight) -> torch.dtype:
    dtypes = {name: source.dtype(name) for name in row.sources}
    if len(set(dtypes.values())) > 1:
        raise UserError(f"{source.path}: {dtypes} become one tensor: choose its dtype with --dtype")
    return next(iter(dtypes.values()))


def _checked(tensor: Tensor, move: Move, path: Path) -> Tensor:
    """The tensor in the output's dtype.

    Raises:
        UserError: it has a number that is not finite.
    """
    out = tensor.to(move.dtype)
    if not bool(torch.stack(out.aminmax()).isfinite().all()):
        was_finite = bool(torch.stack(tensor.aminmax()).isfinite().all())
        raise UserError(
            f"{path}: {' / '.join(move.row.sources)} ({move.row.name}) has NaN or infinite values"
            + (f" as {dtype_name(move.dtype)}; choose another dtype" if was_finite else "")
        )
    return out


def _shards(moves: Sequence[Move], shard_bytes: int) -> list[list[Move]]:
    shards: list[list[Move]] = [[]]
    size = 0
    for move in moves:
        if shards[-1] and size + move.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(move)
        size += move.nbytes
    return shards


def _staging(
    source: Path, out: Path, moves: Sequence[Move], shard_bytes: int, *, resume: bool
) -> Staging:
    plan = {
        "source": str(source.resolve()),
        "files": sorted((f.name, f.stat().st_size, f.stat().st_mtime) for f in source.iterdir()),
        "dtypes": [dtype_name(m.dtype) for m in moves],
        "shard_bytes": shard_bytes,
    }
    return Staging(out, plan, needed_bytes=sum(m.nbytes for m in moves), resume=resume)


def _write_shards(
    staging: Staging,
    names: Sequence[str],
    shards: Sequence[Sequence[Move]],
    write: Callable[[Sequence[Move], BinaryIO], Any],
    progress: Progress,
) -> list[Any]:
    receipts = []
    for name, shard in zip(names, shards, strict=True):
        if staging.receipt(name) is not None:
            progress.skip(sum(m.nbytes for m in shard))
        receipts.append(staging.write(name, partial(write, shard)))
    return receipts


def _print_plan(moves: Sequence[Move], files: dict[str, list[Move]], *, to_hf: bool) -> None:
    for line in _plan_lines(files, to_hf=to_hf):
        print(line)
    total = sum(m.nbytes for m in moves)
    print(f"{len(moves)} rows, {len(files)} files, {total / 1e9:.3f} GB")


def _plan_lines(files: dict[str, list[Move]], *, to_hf: bool) -> Iterator[str]:
    for file, shard in files.items():
        for move in shard:
            for name, dtype, shape in move.specs:
                ends = (move.row.name, name) if to_hf else (name, move.row.name)
                nbytes = torch.Size(shape).numel() * dtype.itemsize
                what = f"{list(shape)} {dtype_name(dtype)}  {nbytes} B"
                yield f"{file}  {ends[0]} -> {ends[1]}  {what}"

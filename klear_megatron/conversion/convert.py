"""The two conversions, and the export of a policy in training.

All of them move one row of the architecture's table after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from klear_megatron.checkpoints.checksums import (
    check_companions,
    weights_being_checked,
    write_checksums,
)
from klear_megatron.checkpoints.dtypes import DTYPES
from klear_megatron.checkpoints.hf_reader import HFCheckpoint, copy_companions
from klear_megatron.checkpoints.hf_writer import (
    set_config_dtype,
    shard_names,
    write_index,
    write_shard,
)
from klear_megatron.checkpoints.megatron_companions import move_to_release
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.checkpoints.megatron_writer import WrittenChunk, write_metadata, write_row
from klear_megatron.checkpoints.model_folder import ModelFolder, config_of
from klear_megatron.checkpoints.plan import SHARD_BYTES, Move, describe, in_shards
from klear_megatron.checkpoints.stages import read_stages, write_stages
from klear_megatron.conversion.job import Processes, carry_out, read_ahead
from klear_megatron.errors import UserError
from klear_megatron.models import Weight, padded_vocab_size
from klear_megatron.observability import Progress

if TYPE_CHECKING:
    from klear_megatron.policy.model import Model


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    resume: bool = False,
) -> None:
    """Writes a Megatron checkpoint's weights as a Hugging Face folder.

    Works for every parallel layout, needs no GPUs or ranks, and holds only a few rows of the table
    in memory.

    Args:
        checkpoint: folder of a Megatron distributed checkpoint, of this package, Megatron-LM,
            Megatron-Bridge or slime.
        hf: folder with the model's config and tokenizer; by default what `config_of` finds.
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint.
        shard_bytes: size limit of a safetensors file; a larger row gets a file of its own.
        dry_run: print the plan and write nothing.
        resume: keep the files that an interrupted run of the same conversion has completed.

    Raises:
        UserError: weights that do not fit the config, are not finite or are corrupt; no space.
    """
    source = MegatronCheckpoint(checkpoint)
    with config_of(source, hf) as folder:
        table = source.table(folder.config)
        moves = [Move(row, DTYPES[dtype] if dtype else source.dtype(row)) for row in table]

        def tensors(move: Move) -> list[Tensor]:
            return move.row.mapping.split(move.checked(source.tensor(move.row), checkpoint))

        def rows(moves: Sequence[Move]) -> Iterator[list[Tensor]]:
            return read_ahead(map(tensors, moves))

        processes = Processes.join()
        files = _hf_files(moves, shard_bytes)
        if dry_run:
            _print_plan(files, processes, to_hf=True)
        else:
            _write_hf(
                files,
                rows,
                checkpoint,
                folder,
                out,
                resume,
                processes,
                lambda written: write_stages(written, read_stages(checkpoint)),
            )


def export_hf(model: "Model", out: Path, write_beside: Callable[[Path], None]) -> None:
    """Writes the weights of a policy in training as a Hugging Face folder. Collective.

    Args:
        write_beside: writes more files into the folder; called on the first rank.

    Raises:
        UserError: `out` exists, weights are not finite, or the disk is full.
    """
    named_tensors = model.named_hf_tensors()
    if dist.get_rank() > 0:
        for _ in named_tensors:
            pass
        return
    source = model.folder.path
    dtype = DTYPES[model.config.dtype]
    files = _hf_files([Move(row, dtype) for row in model.folder.table()], SHARD_BYTES)

    def tensors(move: Move) -> list[Tensor]:
        return [move.checked(next(named_tensors)[1].cpu(), source) for _ in move.row.sources]

    def rows(moves: Sequence[Move]) -> Iterator[list[Tensor]]:
        # No read-ahead: gathering is collective, so one thread must do all of it.
        return map(tensors, moves)

    alone = Processes(0, 1)
    _write_hf(files, rows, source, model.folder, out, False, alone, write_beside)
    for _ in named_tensors:
        pass


def hf_to_megatron(
    hf_dir: Path,
    out: Path,
    *,
    dtype: str | None = None,
    tensor_parallel_size: int = 1,
    for_megatron_lm: bool = False,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    resume: bool = False,
) -> None:
    """Writes a Hugging Face folder's weights as a Megatron distributed checkpoint.

    Every parallel layout can load it. Only a few rows of the table are in memory at a time. The
    config and the tokenizer are copied to `hf/`. If the folder has SHA256SUMS, all files are
    checked against them.

    Args:
        tensor_parallel_size: the number of pieces in which tensors are stored, so that each of
            that many tensor-parallel ranks reads only its own piece.
        for_megatron_lm: make `out` a root for Megatron-LM's `--load`: the checkpoint becomes its
            `release`, beside the tracker.
        dtype, shard_bytes, dry_run, resume: as for `megatron_to_hf`.

    Raises:
        UserError: weights that do not fit the config, are not finite or are corrupt; no space.
    """
    check_companions(hf_dir)
    source = HFCheckpoint(hf_dir)
    table = _table_for_ranks(hf_dir, tensor_parallel_size)
    source.check(table)
    moves = [Move(row, DTYPES[dtype] if dtype else _common_dtype(source, row)) for row in table]
    processes = Processes.join()
    shards = in_shards(moves, shard_bytes)
    files = {f"__{number}_0.distcp": shard for number, shard in enumerate(shards)}
    if dry_run:
        _print_plan(files, processes, to_hf=False)
        return
    pieces = {"tensor_parallel_size": tensor_parallel_size, "for_megatron_lm": for_megatron_lm}
    with weights_being_checked(hf_dir, enabled=processes.rank == 0) as wait:
        carry_out(
            files,
            partial(_write_megatron_file, source, tensor_parallel_size),
            partial(_finish_megatron, source, moves, for_megatron_lm, wait),
            source=hf_dir,
            out=out,
            settings=pieces,
            resume=resume,
            processes=processes,
        )


def _write_megatron_file(
    source: HFCheckpoint,
    tensor_parallel_size: int,
    shard: Sequence[Move],
    progress: Progress,
    file: BinaryIO,
) -> list[dict[str, Any]]:
    """Writes the moved rows; returns where in the file their pieces are."""

    def tensor(move: Move) -> Tensor:
        full = move.row.mapping.merge([source.tensor(name) for name in move.row.sources])
        return move.checked(full, source.path)

    chunks: list[WrittenChunk] = []
    for move, full in zip(shard, read_ahead(map(tensor, shard)), strict=True):
        chunks += write_row(file, move.row, full, tensor_parallel_size)
        progress.advance(move.nbytes)
    return [asdict(chunk) for chunk in chunks]


def _finish_megatron(
    source: HFCheckpoint,
    moves: Sequence[Move],
    for_megatron_lm: bool,
    wait_for_checksums: Callable[[], None],
    folder: Path,
    receipts: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Writes what tells where the pieces of all files are, and `hf/`."""
    wait_for_checksums()
    (folder / "hf").mkdir(exist_ok=True)
    copy_companions(source.path, folder / "hf")
    set_config_dtype(folder / "hf", (move.dtype for move in moves))
    chunks = {name: [WrittenChunk(**chunk) for chunk in receipts[name]] for name in receipts}
    dtypes = {move.row.name: move.dtype for move in moves}
    table = [move.row for move in moves]
    write_metadata(folder, dtypes, table, chunks, ModelFolder(source.path).config)
    if for_megatron_lm:
        move_to_release(folder)


def _table_for_ranks(hf_dir: Path, tensor_parallel_size: int) -> list[Weight]:
    """The model's table, with the vocabulary padded for so many tensor-parallel ranks."""
    if tensor_parallel_size < 1:
        raise UserError(f"{tensor_parallel_size} tensor-parallel ranks: at least 1 is needed")
    folder = ModelFolder(hf_dir)
    _ = folder.architecture  # an unknown one, such as that of images, may have none of the fields
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(folder.config, field) % tensor_parallel_size:
            raise UserError(
                f"{hf_dir}: {field} {getattr(folder.config, field)} cannot be divided between "
                f"{tensor_parallel_size} tensor-parallel ranks"
            )
    return folder.table(padded_vocab_size(folder.config.vocab_size, tensor_parallel_size))


def _hf_files(moves: Sequence[Move], shard_bytes: int) -> dict[str, list[Move]]:
    shards = in_shards(moves, shard_bytes)
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def _write_hf(
    files: Mapping[str, Sequence[Move]],
    rows_of: Callable[[Sequence[Move]], Iterator[list[Tensor]]],
    source: Path,
    companions: ModelFolder,
    out: Path,
    resume: bool,
    processes: Processes,
    write_beside: Callable[[Path], None],
) -> None:
    def write(moves: Sequence[Move], progress: Progress, file: BinaryIO) -> str:
        def tensors() -> Iterator[Tensor]:
            for move, row in zip(moves, rows_of(moves), strict=True):
                yield from row
                progress.advance(move.nbytes)

        return write_shard(file, [spec for move in moves for spec in move.specs], tensors())

    def finish(folder: Path, sums: Mapping[str, str]) -> None:
        companions.copy_companions(folder)
        write_beside(folder)
        specs = [(file, spec) for file, moves in files.items() for m in moves for spec in m.specs]
        set_config_dtype(folder, (dtype for _, (_, dtype, _) in specs))
        if len(files) > 1:
            total = sum(move.nbytes for moves in files.values() for move in moves)
            write_index(folder, {name: file for file, (name, _, _) in specs}, total)
        write_checksums(folder, sums)

    carry_out(
        files,
        write,
        finish,
        source=source,
        out=out,
        resume=resume,
        processes=processes,
        settings={},
    )


def _common_dtype(source: HFCheckpoint, row: Weight) -> torch.dtype:
    dtypes = {name: source.dtype(name) for name in row.sources}
    if len(set(dtypes.values())) > 1:
        raise UserError(f"{source.path}: {dtypes} become one tensor: choose its dtype with --dtype")
    return next(iter(dtypes.values()))


def _print_plan(files: Mapping[str, Sequence[Move]], processes: Processes, *, to_hf: bool) -> None:
    if processes.rank == 0:
        for line in describe(files, to_hf=to_hf):
            print(line)

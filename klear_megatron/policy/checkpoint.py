"""Megatron distributed checkpoints: reshardable, and never seen half-written.

A checkpoint folder holds Megatron's shards, and under `hf/` the Hugging Face config and tokenizer
of the model, so that it can be converted without anything else.
"""

import functools
import inspect
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from klear_megatron.checkpoints.checksums import write_checksums
from klear_megatron.checkpoints.megatron_companions import (
    common_objects,
    point_release_to,
    write_run_config,
)
from klear_megatron.checkpoints.megatron_folder import COMMON, is_megatron_checkpoint
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from klear_megatron.models import padded_vocab_size
from klear_megatron.models.language_model import LanguageModel
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.policy.config import CheckpointConfig
from klear_megatron.policy.optimizer_state import (
    adopt_loaded,
    load_settings,
    optimizer_settings,
    owned_shards,
    sharded_tensors,
)
from klear_megatron.policy.parallel import parallel_sizes
from klear_megatron.policy.random_states import random_states, restore_random_states
from klear_megatron.policy.writers import (
    BackgroundSaves,
    failure_on_all_ranks,
    prepare_writers,
    watch_writers,
)

_logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_OWN_WRITER = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
"""After 0.16, Megatron-Core takes another package's writer by default: nvidia-resiliency-ext's."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of `step`."""
    return run_dir / "checkpoints" / f"step_{step:08}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if it has one."""
    return max(_complete(run_dir / "checkpoints"), default=None)


def _complete(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(
        path
        for path in folder.glob("step_*")
        if path.suffix != _PARTIAL and is_megatron_checkpoint(path)
    )


class CheckpointWriter:
    """Writes checkpoints beside their final name and renames them when they are complete.

    A process that is killed at any moment leaves earlier checkpoints intact. The unfinished one
    stays behind as a `.partial` folder, which is never read and which the next save replaces. A
    checkpoint is announced once it is complete.

    Args:
        folder: the model's config and tokenizer, which come along.
    """

    def __init__(self, config: CheckpointConfig, folder: ModelFolder) -> None:
        self._config = config
        self._folder = folder
        self._queue = BackgroundSaves()

    def save(
        self,
        path: Path,
        chunks: Sequence[LanguageModel],
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
        state: dict[str, Any],
        save_beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Collective. With `asynchronous`, a snapshot is written while training goes on, and `path`
        appears in a later call of `finish`."""
        self.finish(wait=True)
        prepare_writers()
        partial = path.with_suffix(_PARTIAL)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        model = _model_state(chunks)
        common = {
            "optimizer": optimizer_settings(optimizer),
            "scheduler": scheduler.state_dict(),
            "parallel_sizes": parallel_sizes(),
            "trainer": state,
            **self._for_megatron_lm(chunks[0], iteration=state["step"]),
        }
        request = dist_checkpointing.save(
            {
                **model,
                "optimizer_tensors": sharded_tensors(owned_shards(optimizer), model),
                "random_states": random_states(),
                **common,
            },
            str(partial),
            FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _replicas()),
            async_sharded_save=True,
            **_OWN_WRITER,
        )
        _write_common(partial, common)
        if save_beside is not None:
            objects.together(functools.partial(save_beside, partial))
        dtype = chunks[0].config.params_dtype
        request.add_finalize_fn(lambda: self._publish(partial, path, dtype))
        request = watch_writers(request)
        if self._config.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            with failure_on_all_ranks():
                request.execute_sync()

    def _for_megatron_lm(self, chunk: LanguageModel, iteration: int) -> dict[str, Any]:
        hf, tp = self._folder.config, chunk.config.tensor_model_parallel_size
        padded = padded_vocab_size(hf.vocab_size, tp)
        return common_objects(hf, padded, chunk.config.params_dtype, iteration)

    def finish(self, *, wait: bool) -> None:
        """Collective. Publishes what has been written; with `wait`, everything begun.

        Raises:
            UserError: on all ranks, if a checkpoint could not be written on any of them.
        """
        with failure_on_all_ranks():
            self._queue.maybe_finalize_async_calls(blocking=wait)

    def _publish(self, partial: Path, path: Path, dtype: torch.dtype) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            (partial / "hf").mkdir()
            self._folder.copy_companions(partial / "hf")
            write_run_config(partial, self._folder.config, dtype)
            write_checksums(partial, {})
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            say(f"checkpoint {path}")
            point_release_to(path)
            self._prune(path.parent)
        dist.barrier()

    def _prune(self, folder: Path) -> None:
        complete = _complete(folder)
        for path in complete[: -self._config.keep_last] if self._config.keep_last else []:
            every = self._config.keep_every
            if every is None or int(path.name.removeprefix("step_")) % every:
                # Renamed first: a kill in the middle must not leave half of it under its name.
                shutil.rmtree(path.rename(path.with_suffix(_PARTIAL)))


def _write_common(partial: Path, common: dict[str, Any]) -> None:
    """Writes what is no tensor to a file of its own. Megatron-Core 0.16 has done so, and looks for
    it nowhere else; 0.19 has put it among the shards, and reads it from either place."""
    path = partial / COMMON
    if dist.get_rank() == 0 and not path.exists():
        torch.save(common, path)


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint; nothing else is loaded.

    Raises:
        UserError: no checkpoint there.
    """
    _check(path)
    state: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(path))["trainer"]
    return state


def load(
    path: Path,
    chunks: Sequence[LanguageModel],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Collective. Restores everything and returns the trainer's state.

    Random states belong to ranks: in another layout they stay as they were seeded.

    Raises:
        UserError: no checkpoint there.
    """
    _check(path)
    common = dist_checkpointing.load_common_state_dict(str(path))
    saved_sizes = common["parallel_sizes"]
    same_sizes = saved_sizes == parallel_sizes()
    load_settings(optimizer, common["optimizer"])
    model, shards = _model_state(chunks), owned_shards(optimizer)
    loaded = _load(
        {
            **model,
            "optimizer_tensors": sharded_tensors(shards, model),
            **({"random_states": random_states()} if same_sizes else {}),
        },
        path,
    )
    _load_model_state(chunks, loaded)
    adopt_loaded(shards)
    scheduler.load_state_dict(loaded["scheduler"])
    if same_sizes:
        restore_random_states(loaded["random_states"])
    elif dist.get_rank() == 0:
        _logger.warning(
            f"{path}: written with {_describe(saved_sizes)}, this run has "
            f"{_describe(parallel_sizes())}: random states are seeded afresh"
        )
    state: dict[str, Any] = loaded["trainer"]
    return state


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def load_weights(path: Path, chunks: Sequence[LanguageModel]) -> None:
    """Collective. Restores the weights alone.

    Raises:
        UserError: no checkpoint there.
    """
    _check(path)
    state = _model_state(chunks)
    # Transformer Engine keeps FP8 state per matrix. It is not a weight, and converted checkpoints
    # do not have it; given None, a module makes a new one.
    weights = {
        name: {key: value for key, value in part.items() if not isinstance(value, ShardedObject)}
        for name, part in state.items()
    }
    nothing = {name: dict.fromkeys(part.keys() - weights[name]) for name, part in state.items()}
    loaded = _load(weights, path)
    _load_model_state(chunks, {name: {**nothing[name], **loaded[name]} for name in state})


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads each replicated tensor once per data-parallel group."""
    strategy = get_default_load_sharded_strategy(str(path))
    loaded: dict[str, Any] = dist_checkpointing.load(
        state, str(path), FullyParallelLoadStrategyWrapper(strategy, _replicas())
    )
    return loaded


def _replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _check(path: Path) -> None:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise UserError(f"{path}: not a Megatron distributed checkpoint")


def _model_state(chunks: Sequence[LanguageModel]) -> dict[str, Any]:
    return {name: chunk.sharded_state_dict() for name, chunk in _named(chunks).items()}


def _load_model_state(chunks: Sequence[LanguageModel], loaded: dict[str, Any]) -> None:
    for name, chunk in _named(chunks).items():
        chunk.load_state_dict(loaded[name])


def _named(chunks: Sequence[LanguageModel]) -> dict[str, LanguageModel]:
    """The chunks by their names in a checkpoint, which are Megatron-LM's."""
    return {f"model{i}" if len(chunks) > 1 else "model": c for i, c in enumerate(chunks)}

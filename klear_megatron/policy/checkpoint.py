"""Megatron distributed checkpoints: reshardable, and never seen half-written.

A checkpoint folder holds Megatron's shards, and under `hf/` the Hugging Face config and tokenizer
that the weights belong to, so that it can be converted without anything else.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from klear_megatron.errors import UserError
from klear_megatron.models.language_model import LanguageModel

# How the distributed optimizer's state is cut: loadable in any other layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

_PARTIAL = ".partial"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of `step`."""
    return run_dir / "checkpoints" / f"step_{step:08}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if it has one."""
    complete = [
        path for path in (run_dir / "checkpoints").glob("step_*") if path.suffix != _PARTIAL
    ]
    return max(complete, default=None)


def save(
    path: Path,
    chunks: Sequence[LanguageModel],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
    *,
    companions: Path,
) -> None:
    """Collective. Writes beside `path` and renames at the end."""
    partial = path.with_suffix(_PARTIAL)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "hf").mkdir(parents=True)
        for file in sorted(companions.iterdir()):
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copy2(file, partial / "hf")
    dist.barrier()
    sharded = _model_state(chunks)
    dist_checkpointing.save(
        {
            **sharded,
            "optimizer": optimizer.sharded_state_dict(sharded, metadata=_METADATA),
            "scheduler": scheduler.state_dict(),
            "trainer": state,
        },
        str(partial),
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    dist.barrier()


def load(
    path: Path,
    chunks: Sequence[LanguageModel],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Collective. Restores everything and returns the trainer's state.

    Raises:
        UserError: no checkpoint there.
    """
    _check(path)
    sharded = _model_state(chunks)
    loaded = dist_checkpointing.load(
        {
            **sharded,
            "optimizer": optimizer.sharded_state_dict(sharded, is_loading=True, metadata=_METADATA),
        },
        str(path),
    )
    _load_model_state(chunks, loaded)
    _load_optimizer(optimizer, loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    state: dict[str, Any] = loaded["trainer"]
    return state


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> None:
    parts = optimizer.chained_optimizers
    for part, part_state in zip(parts, [state] if len(parts) == 1 else state.values(), strict=True):
        parameter_state = part_state.pop("param_state")
        part.load_state_dict(part_state)
        # Torch's Adam has a step per parameter, which Megatron-Core sets in the line above and
        # would now look for in the checkpoint, where it is kept once. It sets the same tensor for
        # all, which each of them would then count up.
        states = part.optimizer.state.values()
        steps = [each.pop("step", None) for each in states]
        part.load_parameter_state_from_fully_reshardable(parameter_state)
        for each, step in zip(states, steps, strict=True):
            if step is not None:
                each["step"] = step.clone()


def load_weights(path: Path, chunks: Sequence[LanguageModel]) -> None:
    """Collective. Restores the weights alone.

    Raises:
        UserError: no checkpoint there.
    """
    _check(path)
    _load_model_state(chunks, dist_checkpointing.load(_model_state(chunks), str(path)))


def _check(path: Path) -> None:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise UserError(f"{path}: not a Megatron distributed checkpoint")


def _model_state(chunks: Sequence[LanguageModel]) -> dict[str, Any]:
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {n: c.sharded_state_dict() for n, c in zip(names, chunks, strict=True)}


def _load_model_state(chunks: Sequence[LanguageModel], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_model_state(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name])

"""What the training loops share: the run directory, checkpoints, and who talks to the user."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.config import write_config
from klear_megatron.conversion import export_hf
from klear_megatron.errors import make_folder
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.platform.device import init_distributed
from klear_megatron.policy.checkpoint import checkpoint_path, latest_checkpoint
from klear_megatron.policy.config import import_extensions
from klear_megatron.policy.policy import Policy
from klear_megatron.training.config import RunConfig


def start(config: RunConfig) -> None:
    """Joins the other ranks and prepares the run directory.

    Raises:
        UserError: a model or a world size that the config cannot be carried out with.
    """
    import_extensions(config.policy)
    config.policy.parallel.check_model(read_config(config.policy.path))
    init_distributed()
    # Before one rank starts servers while the others wait: Ctrl-C in between is to end them, too.
    objects.connect()
    config.policy.parallel.data_parallel_size(dist.get_world_size())
    if is_main_rank():
        make_folder(config.run_dir)
        write_config(config, config.run_dir / "config.yaml")
    dist.barrier()


def is_main_rank() -> bool:
    """The one rank that talks to the user, writes metrics and holds the full weights."""
    return dist.get_rank() == 0


def resume(policy: Policy, run_dir: Path) -> dict[str, Any] | None:
    """The trainer's state at the newest complete checkpoint of the run, loaded; None without."""
    path = latest_checkpoint(run_dir)
    if path is None:
        return None
    state = policy.load(path)
    if is_main_rank():
        say(f"resuming from {path}")
    return state


def save(
    policy: Policy, config: RunConfig, step: int, last_step: int, state: dict[str, Any]
) -> None:
    """Writes the checkpoints that are due after `step`, Megatron's and Hugging Face's."""
    due = config.save_every is not None and step % config.save_every == 0
    if due or step == last_step:
        path = checkpoint_path(config.run_dir, step)
        policy.save(path, {**state, "step": step})
        if step == last_step:
            policy.finish_saves()
        if is_main_rank():
            say(f"checkpoint {path}")
    if config.export_every is not None and step % config.export_every == 0:
        out = config.run_dir / "hf" / f"step_{step:08}"
        if is_main_rank():
            shutil.rmtree(out, ignore_errors=True)  # of a run that was resumed before this step
        export_hf(policy, out)

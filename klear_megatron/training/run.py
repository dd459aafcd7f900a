"""What the training loops share: the run directory, checkpoints, and who talks to the user."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.config import write_config
from klear_megatron.conversion import export_hf
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.platform.device import init_distributed
from klear_megatron.platform.files import make_folder
from klear_megatron.policy.checkpoint import checkpoint_path, latest_checkpoint
from klear_megatron.policy.config import import_extensions
from klear_megatron.policy.learner import Learner
from klear_megatron.training.config import RunConfig


def start(config: RunConfig) -> ModelFolder:
    """Joins the other ranks and prepares the run directory.

    Returns:
        the folder of the model to train.

    Raises:
        UserError: a model or a world size that the config cannot be carried out with.
    """
    import_extensions(config.policy)
    folder = ModelFolder(config.policy.path)
    config.policy.parallel.check_model(folder)
    init_distributed()
    # Before one rank starts servers while the others wait: Ctrl-C in between is to end them, too.
    objects.connect()
    config.policy.parallel.data_parallel_size(dist.get_world_size())
    if is_main_rank():
        make_folder(config.run_dir)
        write_config(config, config.run_dir / "config.yaml")
    dist.barrier()
    return folder


def is_main_rank() -> bool:
    """The one rank that talks to the user, writes metrics and holds the full weights."""
    return dist.get_rank() == 0


def resume(learner: Learner, run_dir: Path) -> dict[str, Any] | None:
    """The trainer's state at the newest complete checkpoint of the run, loaded; None without."""
    path = latest_checkpoint(run_dir)
    if path is None:
        return None
    state = learner.load(path)
    if is_main_rank():
        say(f"resuming from {path}")
    return state


def save(
    learner: Learner, config: RunConfig, step: int, last_step: int, state: dict[str, Any]
) -> None:
    """Writes the checkpoints that are due after `step`, Megatron's and Hugging Face's."""
    due = config.save_every is not None and step % config.save_every == 0
    if due or step == last_step:
        path = checkpoint_path(config.run_dir, step)
        learner.save(path, {**state, "step": step})
        if step == last_step:
            learner.finish_saves()
        if is_main_rank():
            say(f"checkpoint {path}")
    if config.export_every is not None and step % config.export_every == 0:
        out = config.run_dir / "hf" / f"step_{step:08}"
        if is_main_rank():
            shutil.rmtree(out, ignore_errors=True)  # of a run that was resumed before this step
        export_hf(learner.model, out)

"""What the training loops share: starting, saving, and which rank talks to the user."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from klear_megatron.checkpoints.megatron_folder import newest_in
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.checkpoints.run_config import RUN_CONFIG
from klear_megatron.config import write_config
from klear_megatron.conversion import export_hf
from klear_megatron.platform import objects
from klear_megatron.platform.device import init_distributed
from klear_megatron.platform.files import make_folder
from klear_megatron.platform.fingerprints import fingerprint, samples
from klear_megatron.policy.checkpoint import checkpoint_path
from klear_megatron.policy.config import import_extensions
from klear_megatron.policy.learner import Learner
from klear_megatron.training.config import RunConfig


def start(config: RunConfig) -> ModelFolder:
    """Joins the other ranks and prepares the run directory.

    Returns:
        the folder of the model to train.

    Raises:
        UserError: the config does not fit the model or the world size.
    """
    import_extensions(config.policy)
    folder = ModelFolder(config.policy.hf_folder)
    config.policy.parallel.check_model(folder)
    init_distributed()
    # Before one rank starts servers while the others wait, so that Ctrl-C ends those too.
    objects.connect()
    config.policy.parallel.data_parallel_size(dist.get_world_size())
    if is_main_rank():
        make_folder(config.run_dir)
    dist.barrier()
    return folder


def is_main_rank() -> bool:
    """The one rank that talks to the user, writes metrics and holds the full weights."""
    return dist.get_rank() == 0


@functools.cache
def base_fingerprint(path: Path) -> str:
    """Collective at its first call. Tells the weights at `policy.path` from others."""

    def read() -> str:
        folder = newest_in(path)
        files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.distcp")))
        return fingerprint(part for file in files for part in (file.name.encode(), *samples(file)))

    return objects.broadcast(objects.together(lambda: read() if is_main_rank() else ""))


def save(
    learner: Learner,
    config: RunConfig,
    step: int,
    last_step: int,
    state: dict[str, Any],
    save_beside: Callable[[Path], None] | None = None,
) -> None:
    """Collective. Writes the Megatron and Hugging Face checkpoints that are due after `step`.

    Args:
        save_beside: see `Learner.save`.
    """

    def beside(folder: Path) -> None:
        if is_main_rank():
            write_config(config, folder / RUN_CONFIG)
        if save_beside is not None:
            save_beside(folder)

    due = config.save_every is not None and step % config.save_every == 0
    if due or step == last_step:
        path = checkpoint_path(config.run_dir, step)
        state = {
            **state,
            "step": step,
            "config": config.model_dump(mode="json"),
            "base": base_fingerprint(config.policy.path),
        }
        learner.save(path, state, beside)
        if step == last_step:
            learner.finish_saves()
    if config.export_every is not None and step % config.export_every == 0:
        out = config.run_dir / "hf" / f"step_{step:08}"
        if is_main_rank():
            # Written before the run was resumed from an earlier step.
            shutil.rmtree(out, ignore_errors=True)
        export_hf(learner.model, out)

"""What the training loops share: starting and ending, and which rank talks to the user."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from klear_megatron.checkpoints.hub import local_model
from klear_megatron.checkpoints.megatron_folder import newest_in
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.models.tokenizer import read_template
from klear_megatron.platform import objects, stop
from klear_megatron.platform.device import init_distributed
from klear_megatron.platform.files import make_folder
from klear_megatron.platform.fingerprints import fingerprint, samples
from klear_megatron.platform.locks import locked
from klear_megatron.policy.config import import_extensions
from klear_megatron.training.config import RunConfig
from klear_megatron.training.watchdog import Watchdog

C = TypeVar("C", bound=RunConfig)


@contextlib.contextmanager
def running(config: RunConfig) -> Iterator[ModelFolder]:
    """Joins the other ranks and prepares the run directory, which is this run's alone meanwhile.

    SIGTERM does not end the process meanwhile; see `platform.stop`.

    Yields:
        the folder of the model to train.

    Raises:
        UserError: the config does not fit the model or the world size, or another trainer has the
            run directory.
    """
    with stop.listening(), contextlib.ExitStack() as stack:
        folder = _start(config, stack)
        stack.enter_context(Watchdog(config.run_dir, config.watchdog_s))
        yield folder


def _start(config: RunConfig, stack: contextlib.ExitStack) -> ModelFolder:
    if config.trackers is not None:
        config.trackers.check_installed()
    folder = model_folder(config)
    config.policy.parallel.check_model(folder)
    init_distributed()
    # Before one rank starts servers while the others wait, so that Ctrl-C ends those too.
    objects.connect()
    config.policy.parallel.data_parallel_size(dist.get_world_size())

    def claim() -> None:
        make_folder(config.run_dir)
        refusal = (
            f"{config.run_dir}: another trainer runs there; wait for it to end, or choose another "
            "run_dir"
        )
        stack.enter_context(locked(config.run_dir / "lock", refusal))

    objects.together(lambda: claim() if is_main_rank() else None)
    return folder


def model_folder(config: RunConfig) -> ModelFolder:
    """The folder of the model to train.

    Raises:
        UserError: it cannot be read, or its architecture is unknown.
    """
    import_extensions(config.policy)
    template = config.policy.chat_template
    if template is not None:
        template = read_template(template, "policy.chat_template")
    folder = ModelFolder(config.policy.hf_folder, template)
    _ = folder.architecture  # an unknown one, such as that of images, may have no sizes to check
    return folder


def with_model_here(config: C) -> C:
    """The config with a folder in place of a model's name on the Hugging Face hub.

    Raises:
        UserError: there is neither such a folder nor such a model.
    """
    policy = config.policy
    hf = policy.hf and local_model(policy.hf)
    policy = policy.model_copy(update={"path": local_model(policy.path), "hf": hf})
    return config.model_copy(update={"policy": policy})


def is_main_rank() -> bool:
    """The one rank that talks to the user, writes metrics and holds the full weights; also a
    process that has joined no ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


@functools.cache
def base_fingerprint(path: Path) -> str:
    """Collective at its first call. Tells the weights at `policy.path` from others."""

    def read() -> str:
        folder = newest_in(path)
        files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.distcp")))
        return fingerprint(part for file in files for part in (file.name.encode(), *samples(file)))

    return objects.broadcast(objects.together(lambda: read() if is_main_rank() else ""))

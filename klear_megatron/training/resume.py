"""Going on from a run's newest checkpoint, also with settings that have changed since."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from klear_megatron.config import write_config
from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.policy.checkpoint import latest_checkpoint, read_state
from klear_megatron.policy.learner import Learner
from klear_megatron.training.config import RunConfig
from klear_megatron.training.run import is_main_rank

_CANNOT_CHANGE = {
    "batch_size": "the number of steps, and the position in the data, are counted in batches",
    "policy.dtype": "the checkpoint's weights and optimizer state have the other dtype",
}
"""Settings that a resumed run must keep, and why. The sampler checks the data and the seed."""


def resume(learner: Learner, config: RunConfig, last_step: int) -> dict[str, Any] | None:
    """Collective. Loads the run's newest complete checkpoint and writes config.yaml.

    Settings that changed since the checkpoint apply from here on, and are listed. The first rank
    decides which checkpoint is the newest: on a network file system, others may not see it yet.

    Args:
        last_step: the step that the run ends with.

    Returns:
        the trainer's state; None if the run has no checkpoint.

    Raises:
        UserError: a setting has changed that cannot, or the checkpoint is beyond `last_step`.
    """
    path = objects.broadcast(latest_checkpoint(config.run_dir) if is_main_rank() else None)
    state = None
    if path is not None:
        _check(path, read_state(path), config, last_step)
        state = learner.load(path)
        if is_main_rank():
            say(f"resuming from {path}")
            for change in _changes(state["config"], config):
                say(f"  {change}")
    if is_main_rank():
        write_config(config, config.run_dir / "config.yaml")
    return state


def _check(path: Path, state: Mapping[str, Any], config: RunConfig, last_step: int) -> None:
    if state["step"] > last_step:
        raise UserError(
            f"{path}: is of step {state['step']}, but the config asks for {last_step} steps in "
            "all; ask for more, or choose another run_dir"
        )
    before, now = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    for key, reason in _CANNOT_CHANGE.items():
        if key in before and before[key] != now.get(key):
            raise UserError(
                f"{key}: was {before[key]} at {path} and is {now.get(key)}, but cannot change in a "
                f"run: {reason}; change it back, or choose another run_dir"
            )


def _changes(before: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    old, new = _flat(before), _flat(config.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)} -> {new.get(key)}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of a config's nested sections."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

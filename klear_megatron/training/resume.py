"""Going on from a run's newest checkpoint, also with settings that have changed since."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klear_megatron.checkpoints.run_config import RUN_CONFIG
from klear_megatron.config import write_config
from klear_megatron.config.imports import source_file
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import is_template
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.platform.fingerprints import fingerprint
from klear_megatron.policy.checkpoint import latest_checkpoint, read_state
from klear_megatron.policy.learner import Learner
from klear_megatron.training.config import RunConfig
from klear_megatron.training.run import base_fingerprint, is_main_rank

_REFUSED = {
    "batch_size": "the number of steps, and the position in the data, are counted in batches",
    "policy.dtype": "the checkpoint's weights and optimizer state have the other dtype",
    "seed": "the order of the data follows from it",
}
"""Settings that a resumed run must keep, and why. The sampler checks the data."""

_WARNED = {
    "rewards": "rewards and accuracies of earlier steps were graded differently",
    "policy.imports": "the model may now compute something else than its weights were trained for",
    "policy.chat_template": "earlier steps saw other prompts",
    "sampling": "responses of earlier steps were drawn differently",
    "evaluation.benchmarks": "earlier scores are of other problems or samples",
    "evaluation.sampling": "earlier scores were drawn differently",
}
"""Settings, or sections of them, whose change applies but needs care, and why."""

_COUNTED = "the learning-rate schedule counts optimizer steps, of which there are now more or fewer"
_ENDS = "the learning-rate schedule ends at another step than it was made for"
_WARNED_OF_A_DECAY = {
    "prompts_per_step": f"{_COUNTED} in a step",
    "prompts_per_mini_batch": f"{_COUNTED} in a step",
    "epochs": _ENDS,
    "steps": _ENDS,
}
"""Further ones where the learning rate decays."""

_ABSENT = "(absent)"
"""A setting that the other config does not have, such as an option of another loss."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a run goes on from."""

    path: Path
    state: dict[str, Any]
    """The trainer's."""

    def check_last_step(self, last_step: int) -> None:
        """Raises UserError if the checkpoint is beyond the step that the run ends with."""
        if self.state["step"] > last_step:
            raise UserError(
                f"{self.path}: is of step {self.state['step']}, but the config asks for "
                f"{last_step} steps in all; ask for more, or choose another run_dir"
            )


def find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """Collective. The run's newest complete checkpoint, if it has one. Reads no weights.

    The first rank decides which checkpoint is the newest: on a network file system, others may not
    see it yet.

    Raises:
        UserError: a setting has changed that cannot, or `policy.path` holds another model.
    """
    base_fingerprint(config.policy.path)  # now, as the files may be replaced while the run goes on
    path = objects.broadcast(latest_checkpoint(config.run_dir) if is_main_rank() else None)
    if path is None:
        return None
    state = read_state(path)
    _check(path, state, config)
    return Checkpoint(path, state)


def resume(learner: Learner, config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Collective. Loads the checkpoint. Settings that changed since it apply from here on, and are
    listed.

    Returns:
        the trainer's state.
    """
    learner.load(checkpoint.path)
    changes = list(_changes(checkpoint.state, config))
    decays = config.policy.optimizer.lr_decay_style != "constant"
    warned = _WARNED | _WARNED_OF_A_DECAY if decays else _WARNED
    if is_main_rank():
        say(f"resuming from {checkpoint.path}")
        for line in _describe(changes, warned, checkpoint.state["step"] + 1):
            say(line)
    return checkpoint.state


def code_fingerprints(config: RunConfig) -> dict[str, dict[str, str]]:
    """Collective. Setting -> file -> what tells the file from others, of all code and templates of
    the user's own."""

    def read() -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for key, file in _own_files(config) if is_main_rank() else ():
            found.setdefault(key, {})[str(file)] = fingerprint([file.read_bytes()])
        return found

    return objects.broadcast(objects.together(read))


def _own_files(config: RunConfig) -> Iterator[tuple[str, Path]]:
    for key, name in config.own_code:
        if (file := source_file(name)) is not None:
            yield key, file
    template = config.policy.chat_template
    if template is not None and not is_template(template):
        yield "policy.chat_template", Path(template).expanduser()


def record_config(config: RunConfig, first: int) -> None:
    """Writes config.yaml, once the run goes on. Only the first rank does it.

    `configs/step_<n>.yaml` keeps each config that the run has had, by the first step with it.
    """
    if not is_main_rank():
        return
    kept = config.run_dir / "configs"
    kept.mkdir(exist_ok=True)
    for path in kept.glob("step_*.yaml"):
        if path.stem >= _kept_name(first):  # of steps that are done again
            path.unlink()
    write_config(config, config.run_dir / RUN_CONFIG)
    text = (config.run_dir / RUN_CONFIG).read_text()
    newest = max(kept.glob("step_*.yaml"), default=None)
    if newest is None or newest.read_text() != text:
        (kept / f"{_kept_name(first)}.yaml").write_text(text)


def _kept_name(step: int) -> str:
    return f"step_{step:08}"


def _check(path: Path, state: Mapping[str, Any], config: RunConfig) -> None:
    before, now = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    for key, reason in _REFUSED.items():
        if key in before and before[key] != now.get(key):
            raise UserError(
                f"{key}: was {before[key]} at {path} and is {now.get(key)}, but cannot change in a "
                f"run: {reason}; change it back, or choose another run_dir"
            )
    if base_fingerprint(config.policy.path) != state["base"]:
        raise UserError(
            f"policy.path: {config.policy.path} holds other weights than {before['policy.path']} "
            f"did when {path} was written; a run goes on from its checkpoint and would not use "
            "them. Change it back, or choose another run_dir to train this model"
        )


def _changes(state: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, str]]:
    """Collective. Each setting that has changed since, and how."""
    old, new = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, f"{old.get(key, _ABSENT)} -> {new.get(key, _ABSENT)}"
    before = state.get("code", {})
    for key, files in code_fingerprints(config).items():
        for file, now in files.items():
            if before.get(key, {}).get(file, now) != now:
                yield key, f"{file} is not what it was"


def _describe(
    changes: Sequence[tuple[str, str]], warned: Mapping[str, str], first: int
) -> Iterator[str]:
    if changes:
        yield f"changed, from step {first} on:"
    for key, change in changes:
        yield f"  {key}: {change}"
        for section, why in warned.items():
            if key == section or key.startswith(f"{section}."):
                yield f"    warning: {why}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of a config's nested sections."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

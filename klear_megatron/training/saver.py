"""When a run writes checkpoints: at the steps that its config says, and if it is told to stop or
fails between two."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from klear_megatron.checkpoints.run_config import RUN_CONFIG
from klear_megatron.checkpoints.stages import Stage, write_stages
from klear_megatron.config import write_config
from klear_megatron.conversion import export_hf
from klear_megatron.errors import Stopped, UserError
from klear_megatron.observability import Phases, Recorder, say
from klear_megatron.platform import heartbeat, stop
from klear_megatron.platform.files import write_atomically
from klear_megatron.policy.checkpoint import checkpoint_path
from klear_megatron.policy.learner import Learner
from klear_megatron.training.config import RunConfig
from klear_megatron.training.resume import code_fingerprints
from klear_megatron.training.run import base_fingerprint, is_main_rank
from klear_megatron.training.stages import earlier_stages, this_stage

_FINISHED = "finished.json"


def is_finished(config: RunConfig, last_step: int) -> bool:
    """Whether an earlier start of this run has done all that it asks for; says so. For one rank."""
    path = config.run_dir / _FINISHED
    done: bool = path.is_file() and json.loads(path.read_text())["step"] == last_step
    if done:
        say(
            f"{config.run_dir}: finished: step {last_step} of {last_step} is done; nothing to do. "
            "To train further, ask for more steps or epochs"
        )
    return done


class Saver:
    """Saves a run; a context manager around its steps.

    When they end with `Stopped`, or fail in `between_steps`, it saves the last step that was
    trained, unless its checkpoint is there already. Call every method on all ranks.

    Args:
        step: the last one that is trained and saved; 0 at the beginning.
        state: what the trainer needs to go on after the last step that was trained.
        save_beside: see `Learner.save`.
    """

    def __init__(
        self,
        learner: Learner,
        config: RunConfig,
        last_step: int,
        step: int,
        state: Callable[[], dict[str, Any]],
        save_beside: Callable[[Path], None] | None = None,
    ) -> None:
        self._learner, self._config, self._last_step = learner, config, last_step
        self._state, self._save_beside = state, save_beside
        self._code = code_fingerprints(config)  # now, as the files may be edited meanwhile
        self._earlier_stages = earlier_stages(config) if is_main_rank() else []
        self._trained = self._saved = step
        heartbeat.trained(step)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            raise Stopped(f"told to stop: {self._save_last()}; run it again to go on") from error
        if error is None and is_main_rank():
            with write_atomically(self._config.run_dir / _FINISHED) as file:
                json.dump({"step": self._trained}, file)

    def trained(self, step: int) -> None:
        """The optimizer steps of `step` are done.

        Raises:
            Stopped: on all ranks, if any was told to stop.
        """
        self._trained = step
        heartbeat.trained(step)
        stop.check_all()

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Around what is done while no weights change, and raises a UserError on all ranks or on
        none: the last step that was trained is then saved, and the error says so."""
        try:
            yield
        except Stopped:
            raise
        except UserError as error:
            if self._trained:
                error.args = (f"{error}; {self._save_last()}; run it again to go on",)
            raise

    def save_what_is_due(self, phases: Phases, recorder: Recorder | None) -> None:
        """Writes the Megatron and Hugging Face checkpoints that are due after the last step, and
        adds the seconds that this takes to the step's row; `phases` begins anew."""
        step, config = self._trained, self._config
        last = step == self._last_step
        save = last or (config.save_every is not None and step % config.save_every == 0)
        export = config.export_every is not None and step % config.export_every == 0
        if not save and not export:
            return
        with phases("save"):
            if save:
                self._save()
            if last:
                self._learner.finish_saves()
            if export:
                self._export()
        seconds = phases.take()["seconds/save"]
        if recorder is not None:
            recorder.add({"seconds/save": seconds})

    def _export(self) -> None:
        out = self._config.run_dir / "hf" / f"step_{self._trained:08}"
        if is_main_rank():
            # Written before the run was resumed from an earlier step.
            shutil.rmtree(out, ignore_errors=True)
        step = self._trained
        export_hf(self._learner.model, out, lambda folder: write_stages(folder, self._stages(step)))

    def _stages(self, step: int) -> list[Stage]:
        return [*self._earlier_stages, this_stage(self._config, step)]

    def _save_last(self) -> str:
        """Saves the last step that was trained, unless its checkpoint is there already; returns
        what is saved, for a message."""
        if self._trained > self._saved:
            self._save()
        self._learner.finish_saves()
        return f"step {self._trained} is saved" if self._trained else "no step was done yet"

    def _save(self) -> None:
        step, config = self._trained, self._config
        path = checkpoint_path(config.run_dir, step)
        state = {
            **self._state(),
            "step": step,
            "config": config.model_dump(mode="json"),
            "base": base_fingerprint(config.policy.path),
            "code": self._code,
        }

        def beside(folder: Path) -> None:
            if is_main_rank():
                write_config(config, folder / RUN_CONFIG)
                write_stages(folder, self._stages(step))
            if self._save_beside is not None:
                self._save_beside(folder)

        self._learner.save(path, state, beside)
        self._saved = step

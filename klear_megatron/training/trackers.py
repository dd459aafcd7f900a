"""Where a run's metrics go beside its own folder: Weights & Biases, and MLflow."""

import contextlib
import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from klear_megatron.errors import UserError
from klear_megatron.observability import Recorder, Tracker
from klear_megatron.platform.files import write_atomically
from klear_megatron.training.config import MLflowConfig, RunConfig, TrackersConfig, WandbConfig
from klear_megatron.training.run import is_main_rank


def make_recorder(
    config: RunConfig, next_step: int, stack: contextlib.ExitStack
) -> Recorder | None:
    """What records the run's metrics on the first rank; None on others. `stack` ends it.

    Raises:
        UserError: a tracker of the config refuses the run.
    """
    if not is_main_rank():
        return None
    wanted, trackers = config.trackers or TrackersConfig(), list[Tracker]()
    if wanted.wandb is not None:
        trackers.append(WandbTracker(wanted.wandb, config))
    if wanted.mlflow is not None:
        trackers.append(MLflowTracker(wanted.mlflow, config))
    return stack.enter_context(Recorder(config.run_dir, next_step=next_step, trackers=trackers))


class WandbTracker:
    """A run of Weights & Biases. A run that is resumed goes on in the same one.

    Raises:
        UserError: wandb refuses the run.
    """

    name = "wandb"

    def __init__(self, settings: WandbConfig, config: RunConfig) -> None:
        wandb = importlib.import_module("wandb")
        kept = _Kept(config.run_dir / "wandb.json")
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or config.run_dir.name,
                group=settings.group,
                mode=settings.mode,
                dir=config.run_dir,
                config=config.model_dump(mode="json"),
                id=kept.id,
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(f"trackers.wandb: {error}") from error
        # Not wandb's own step, which never goes back: steps after a checkpoint are done again.
        self._run.define_metric("*", step_metric="step")
        kept.write(self._run.id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflowTracker:
    """A run of MLflow. A run that is resumed goes on in the same one.

    Raises:
        UserError: MLflow refuses the run.
    """

    name = "mlflow"

    def __init__(self, settings: MLflowConfig, config: RunConfig) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient(tracking_uri=settings.tracking_uri)
        kept = _Kept(config.run_dir / "mlflow.json")
        try:
            self.run_id = kept.id or self._make_run(settings, config)
            self._client.update_run(self.run_id, status="RUNNING")
            self._client.log_dict(self.run_id, config.model_dump(mode="json"), "config.yaml")
        except self._mlflow.MlflowException as error:
            raise UserError(f"trackers.mlflow: {error}") from error
        kept.write(self.run_id)

    def _make_run(self, settings: MLflowConfig, config: RunConfig) -> str:
        found = self._client.get_experiment_by_name(settings.experiment)
        experiment = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(settings.experiment)
        )
        name = settings.name or config.run_dir.name
        made = self._client.create_run(experiment, run_name=name)
        return str(made.info.run_id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        row = [self._mlflow.entities.Metric(k, v, now, step) for k, v in metrics.items()]
        self._client.log_batch(self.run_id, metrics=row)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class _Kept:
    """The tracker's name for a run, in the run directory, so that a resumed run goes on in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id: str | None = json.loads(path.read_text())["id"] if path.exists() else None

    def write(self, run_id: str) -> None:
        with write_atomically(self._path) as file:
            json.dump({"id": run_id}, file)

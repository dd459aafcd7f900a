"""Settings that every training run has."""

import importlib.util
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from klear_megatron.config import Section
from klear_megatron.errors import UserError
from klear_megatron.policy.config import PolicyConfig


class WandbConfig(Section):
    """A run of Weights & Biases, whose key is in WANDB_API_KEY or ~/.netrc."""

    project: str = "klear_megatron"
    """The project that gets the run; it is made if it does not exist."""
    entity: str | None = None
    """User or team; by default the key's."""
    name: str | None = None
    """The run's name; by default that of `run_dir`."""
    group: str | None = None
    """Runs of one group are shown together."""
    mode: Literal["online", "offline"] = "online"
    """Offline writes to `run_dir`, for `wandb sync` to send later."""


class MLflowConfig(Section):
    """A run of MLflow, whose credentials are in MLFLOW_TRACKING_USERNAME and the like."""

    tracking_uri: str
    """Where MLflow keeps runs, such as `http://host:5000` or `sqlite:///mlflow.db`."""
    experiment: str = "klear_megatron"
    """The experiment that gets the run; it is made if it does not exist."""
    name: str | None = None
    """The run's name; by default that of `run_dir`."""


class TrackersConfig(Section):
    """Where metrics go beside the run directory."""

    wandb: WandbConfig | None = None
    """Weights & Biases; needs `pip install 'klear-megatron[wandb]'`."""
    mlflow: MLflowConfig | None = None
    """MLflow; needs `pip install 'klear-megatron[mlflow]'`."""

    def check_installed(self) -> None:
        """Checks that each tracker's package is here.

        Raises:
            UserError: it is not.
        """
        for package, settings in (("wandb", self.wandb), ("mlflow", self.mlflow)):
            if settings is not None and importlib.util.find_spec(package) is None:
                raise UserError(
                    f"trackers.{package}: the package {package} is not installed; install it with "
                    f"`pip install 'klear-megatron[{package}]'`, or remove trackers.{package}"
                )


class RunConfig(Section):
    """What every training run has."""

    run_dir: Path
    """Everything the run writes: config, metrics, logs, rollouts, checkpoints. A run that finds a
    checkpoint there goes on from it."""
    seed: int = 0
    """Fixes the order of the data, and what is drawn at random."""
    save_every: PositiveInt | None
    """Steps between checkpoints; one is always written at the end, and with null only there.
    `policy.checkpoint` says how many are kept."""
    export_every: PositiveInt | None = None
    """Steps between Hugging Face checkpoints, written to `hf/` under the run directory."""
    watchdog_s: PositiveInt | None = 3600
    """End the run when no rank has made progress for so many seconds, and write down where each one
    waits. Longer than the longest save. Null waits for ever."""
    start_without_room: bool = False
    """Start even if the plan says that the memory does not suffice for the longest sequences."""
    trackers: TrackersConfig | None = None
    policy: PolicyConfig

    @property
    def own_code(self) -> list[tuple[str, str]]:
        """The settings that name the user's own modules or functions, and the names."""
        return [("policy.imports", name) for name in self.policy.imports]

    @property
    @abstractmethod
    def method(self) -> str:
        """How the model is trained, in words."""

    @property
    @abstractmethod
    def data_paths(self) -> Sequence[Path]:
        """The data sets to train on."""

    @abstractmethod
    def describe_step(self, data_parallel_size: int) -> list[str]:
        """How a step's samples are divided over the data-parallel ranks, in plain lines."""

"""The config of a run, which lies in its folder and in those of its checkpoints."""

from pathlib import Path
from typing import Any

import yaml

from klear_megatron.config.reading import read_values

RUN_CONFIG = "config.yaml"


def read_run_config(checkpoint: Path) -> dict[str, Any] | None:
    """The resolved config as plain values; None for a checkpoint that no run of ours wrote."""
    path = checkpoint / RUN_CONFIG
    if not path.is_file():
        return None
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def tokenizer_folder(run_dir: Path) -> Path:
    """The folder with the tokenizer of a training run's model.

    Raises:
        UserError: `run_dir` has no config that can be read.
    """
    policy = read_values(run_dir / RUN_CONFIG)["policy"]
    return Path(policy.get("hf") or policy["path"])

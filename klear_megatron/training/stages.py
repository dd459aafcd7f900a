"""What a run adds to the stages of the model that it trains."""

import json

from klear_megatron.checkpoints.megatron_folder import newest_in
from klear_megatron.checkpoints.stages import Stage, public_name, read_stages
from klear_megatron.observability import used_until
from klear_megatron.platform.files import complete_lines
from klear_megatron.training.config import RunConfig


def earlier_stages(config: RunConfig) -> list[Stage]:
    """The stages of the model that the run starts from."""
    return read_stages(newest_in(config.policy.path)) or read_stages(config.policy.hf_folder)


def this_stage(config: RunConfig, step: int) -> Stage:
    """The run up to a step whose metrics have been written."""
    lines = complete_lines(config.run_dir / "metrics.jsonl")
    rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    seconds = {
        row["step"]: row["seconds/total"] + row.get("seconds/save", 0.0)
        for row in rows
        if "seconds/total" in row
    }
    epochs = [row["progress/epoch"] for row in rows if "progress/epoch" in row]
    return Stage(
        base=public_name(config.policy.path),
        method=config.method,
        steps=step,
        epochs=round(epochs[-1], 2) if epochs else None,
        data=[public_name(path) for path in config.data_paths],
        used=used_until(config.run_dir, seconds),
    )

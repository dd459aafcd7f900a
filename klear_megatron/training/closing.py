"""The last lines of a run: where its results are, and what to do with them."""

from pathlib import Path


def what_next(run_dir: Path) -> str:
    """For a run that has reached its last step."""
    lines = {
        "checkpoints": str(run_dir / "checkpoints"),
        "numbers": f"{run_dir / 'metrics.jsonl'}, explained in docs/metrics.md",
        "curves": f"klear-megatron report {run_dir}, or tensorboard --logdir {run_dir}",
    }
    if (run_dir / "rollouts").is_dir():
        lines["responses"] = f"klear-megatron show {run_dir} STEP"
    lines["next"] = (
        f"klear-megatron convert {run_dir} {run_dir}-hf, then "
        f"klear-megatron eval EVAL.yaml --model {run_dir}-hf"
    )
    return "\n".join(f"{name:11}  {where}" for name, where in lines.items())

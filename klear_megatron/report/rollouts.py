"""Reads the rollouts that RL runs dump: distributions of all, and a sample to look through."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from klear_megatron.report.runs import Run, rows_of

_BINS = 24


@dataclass(frozen=True)
class Dump:
    """The responses that one leading rank made in one step."""

    step: int
    path: Path


def dumps_of(run: Run) -> list[Dump]:
    """The run's dumps, in the order of their steps."""
    paths = sorted((run.folder / "rollouts").glob("step_*.jsonl"))
    return [Dump(int(path.name.split("_")[1]), path) for path in paths]


def distributions(dumps: Sequence[Dump]) -> dict[str, Any] | None:
    """Per step, the shares of the responses in bins of length and of reward; None without any."""
    lengths: dict[int, list[float]] = {}
    rewards: dict[int, list[float]] = {}
    for dump in dumps:
        for _, row in rows_of(dump.path):
            lengths.setdefault(dump.step, []).append(row["tokens"])
            if row["reward"] is not None:
                rewards.setdefault(dump.step, []).append(row["reward"]["score"])
    if not rewards:
        return None
    return {"tokens": _shares(lengths), "reward": _shares(rewards)}


def _shares(by_step: dict[int, list[float]]) -> dict[str, Any]:
    everything = np.concatenate([np.asarray(values) for values in by_step.values()])
    edges = np.histogram_bin_edges(everything, bins=_BINS)
    counts = [np.histogram(values, bins=edges)[0] for values in by_step.values()]
    return {
        "steps": list(by_step),
        "edges": edges.round(6).tolist(),
        "shares": [(of_one / of_one.sum()).round(5).tolist() for of_one in counts],
    }


def sample(dumps: Sequence[Dump], run: int, limit: int) -> Iterator[dict[str, Any]]:
    """Rows of the page's browser: the same number of each dump's responses, from its beginning, so
    that whole groups can be seen; at most `limit`.

    Args:
        run: the number of the run on the page.
    """
    chosen = dumps if len(dumps) <= limit else dumps[:: -(-len(dumps) // max(limit, 1))]
    for place, dump in enumerate(chosen):
        # The first dumps get what the division leaves over.
        wanted = limit // len(chosen) + (place < limit % len(chosen))
        for _, row in zip(range(wanted), rows_of(dump.path), strict=False):
            yield _row(row[1], run, dump.step)


def _row(row: dict[str, Any], run: int, step: int) -> dict[str, Any]:
    reward = row["reward"] or {}
    return {
        "run": run,
        "step": step,
        "source": row["data_source"],
        "prompt": [[message["role"], message["content"]] for message in row["prompt"]],
        "truth": _shortened(row["ground_truth"]),
        "response": row["response"],
        "tokens": row["tokens"],
        "finish": row["finish_reason"],
        "reward": reward.get("score"),
        "correct": reward.get("correct"),
        "parts": reward.get("parts", {}),
        "advantage": row.get("advantage"),
    }


def _shortened(value: Any, limit: int = 200) -> str:
    """A ground truth as text; the tests of a program can be long."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[:limit] + "…"

"""Writes docs/metrics.md from the metrics' definitions: `python -m tools.metrics_page`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from klear_megatron.evaluation import scores
from klear_megatron.losses import objective
from klear_megatron.observability import Metric, recorder
from klear_megatron.policy import learner
from klear_megatron.rl import metrics as rl
from klear_megatron.training import metrics as training

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

_INTRODUCTION = """\
# Metrics

A training run writes one row per step to `metrics.jsonl` in its `run_dir`, with the key `step` and
the metrics below, and the same numbers to `tensorboard/`. A number that is not finite is `null`
there. A metric that has no meaning in a step, such as the length of right responses where there is
none, is missing from its row.

A step of RL draws responses once and takes several optimizer steps on them; a step of SFT is one
optimizer step. Means over responses and groups are over all that were drawn for the step, trained
on or not. A part of a name in capitals stands for any name.

`python -m tools.metrics_page` writes this page from the definitions, which stand beside the code
that computes each metric.
"""


@dataclass(frozen=True)
class _Section:
    title: str
    note: str
    metrics: tuple[Metric, ...]


def _sections() -> Iterator[_Section]:
    def of(*prefixes: str) -> tuple[Metric, ...]:
        everywhere = (*recorder.METRICS, *training.METRICS, *rl.METRICS)
        return tuple(one for one in everywhere if one.name.split("/")[0] in prefixes)

    trained = (*objective.METRICS, *learner.METRICS, *rl.TRAIN_METRICS)
    yield _Section("Every run", "How far it is.", of("progress", "memory"))
    yield _Section(
        "Training",
        "Of the optimizer steps: in RL the mean over those of the step, and the extremes of all. A "
        "loss of your own adds its metrics under `train/`.",
        (*(one._replace(name=f"train/{one.name}") for one in trained), *of("train")),
    )
    yield _Section("Validation", "In SFT with `validation`, at the steps it says.", of("val"))
    yield _Section("Rewards", "In RL.", of("reward"))
    yield _Section("Responses", "In RL.", of("response"))
    yield _Section("Groups", "In RL; a group is the responses to one prompt.", of("groups"))
    yield _Section("Rollouts", "In RL.", of("rollout"))
    yield _Section(
        "Evaluations",
        "In RL with `evaluation`, at the steps that it says, for each benchmark.",
        tuple(one._replace(name=f"eval/NAME/{one.name}") for one in scores.METRICS),
    )
    yield _Section("Time", "Seconds of the step by what the trainer did.", of("seconds"))
    yield _Section("Speed", "", of("throughput"))
    yield _Section("Work", "Model FLOPs of the step, of all ranks.", of("flops"))


def page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for section in _sections():
        rows = [
            f"| `{one.name}` | {one.unit} | {one.meaning} | {one.worry} |"
            for one in section.metrics
        ]
        table = ["| metric | unit | what it is | when to worry |", "|---|---|---|---|", *rows]
        note = [section.note, ""] if section.note else []
        parts.append("\n".join([f"## {section.title}", "", *note, *table]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())

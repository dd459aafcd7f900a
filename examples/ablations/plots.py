"""Draw the ablations and tabulate them.

    python examples/ablations/plots.py runs/ablations

Writes a picture per ablation, with means over the seeds and their standard errors, and summary.md
with the same numbers, both of the runs that are finished.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from klear_megatron.observability import RolloutFiles

HERE = Path(__file__).parent
LAST = 3
"""The last steps of RL that count for its final accuracy."""
Curve = dict[int, float]
"""A value for each step that has one."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its standard error, which is NaN for one seed."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0] if values else math.nan, math.nan)
        return cls(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5)


class Run:
    """One finished run of one seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        self._rows = [json.loads(line) for line in lines]

    def curve(self, metric: str) -> Curve:
        return {row["step"]: row[metric] for row in self._rows if row.get(metric) is not None}

    def mean(self, metric: str) -> float:
        values = self.curve(metric).values()
        return statistics.fmean(values) if values else math.nan

    @property
    def clipped(self) -> Curve:
        """The share of trained tokens outside the clip range."""
        low, high = self.curve("train/clipped_low"), self.curve("train/clipped_high")
        return {step: low[step] + high[step] for step in low}

    @cached_property
    def scores(self) -> dict[int, list[float]]:
        """Step -> the reward of each of its responses."""
        files = RolloutFiles(self.folder)
        return {
            step: [row["reward"]["score"] for row in files.read_texts(step)]
            for step in files.steps()
        }

    @cached_property
    def accuracies(self) -> dict[str, float]:
        """How many answers are right at the end, by what they are asked. Without an evaluation it
        is that of the last steps, before they train: no problem is drawn twice."""
        results = self.folder / "evaluation" / "results.json"
        if results.exists():
            scores = json.loads(results.read_text())
            return {name: of_one["accuracy"] for name, of_one in scores.items()}
        if evaluated := list(self.curve("eval/code/avg").values()):
            return {"code": evaluated[-1]}
        return {"math": statistics.fmean(list(self.curve("reward/accuracy").values())[-LAST:])}


Runs = dict[str, list[Run]]
"""Variant -> its finished runs, one per seed."""


def read_runs(out: Path, names: Sequence[str]) -> Runs:
    """Those of RL that are finished, and those of SFT that are evaluated, too."""
    folders = {
        name: [
            *(path.parent for path in out.glob(f"rl/{name}/seed_*/finished.json")),
            *(path.parents[1] for path in out.glob(f"sft/{name}/seed_*/evaluation/results.json")),
        ]
        for name in names
    }
    return {name: list(map(Run, sorted(some))) for name, some in folders.items()}


def draw_curves(axes: Axes, runs: Runs, title: str, curve_of: Callable[[Run], Curve]) -> None:
    """A line of means over the seeds for each variant, in a band of one standard error."""
    for number, (name, some) in enumerate(runs.items()):
        curves = [curve_of(run) for run in some]
        steps = sorted(set().union(*curves))
        spreads = [Spread.of([curve[step] for curve in curves if step in curve]) for step in steps]
        low = [spread.mean - spread.error for spread in spreads]
        high = [spread.mean + spread.error for spread in spreads]
        axes.plot(steps, [spread.mean for spread in spreads], color=f"C{number}", label=name)
        axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)


def draw_bars(axes: Axes, runs: Runs, benchmark: str) -> None:
    """A bar for the mean of each variant with its standard error, and a dot for each seed."""
    for number, some in enumerate(runs.values()):
        values = [run.accuracies[benchmark] for run in some]
        spread = Spread.of(values)
        axes.bar(number, spread.mean, color=f"C{number}", alpha=0.5)
        axes.errorbar(number, spread.mean, spread.error, color="black", capsize=4)
        axes.plot([number] * len(values), values, ".", color="black", alpha=0.6)
    axes.set(title=f"final accuracy: {benchmark}", ylim=(0, None))
    axes.set_xticks(range(len(runs)), runs.keys(), rotation=30, ha="right", fontsize=8)
    axes.grid(alpha=0.3, axis="y")


def benchmarks_of(runs: Runs) -> list[str]:
    return list(
        dict.fromkeys(name for some in runs.values() for run in some for name in run.accuracies)
    )


def draw(runs: Runs, title: str) -> Figure:
    """The picture of one ablation: of fine-tuning, bars only."""
    curves: dict[str, Callable[[Run], Curve]] = {}
    if any(run.curve("reward/mean") for some in runs.values() for run in some):
        curves = {
            "right answers while training": lambda run: run.curve("reward/accuracy"),
            "gradient norm": lambda run: run.curve("train/grad_norm"),
            "share of clipped tokens": lambda run: run.clipped,
        }
    if "code" in benchmarks_of(runs):
        curves["reward, mean over a step"] = lambda run: run.curve("reward/mean")
        curves["reward, variance within a step"] = lambda run: {
            step: statistics.pvariance(scores) for step, scores in run.scores.items()
        }
        del curves["share of clipped tokens"]
    panels = len(curves) + len(benchmarks_of(runs))
    columns = 2 if panels == 4 else min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, curve_of) in zip(axes, curves.items(), strict=False):
        draw_curves(axis, runs, name, curve_of)
    for axis, benchmark in zip(axes[len(curves) :], benchmarks_of(runs), strict=False):
        draw_bars(axis, runs, benchmark)
    for axis in axes[panels:]:
        axis.remove()
    if curves:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def numbers(run: Run) -> dict[str, float]:
    """The columns of the table."""
    found = {f"{name}, %": 100 * value for name, value in run.accuracies.items()}
    if scores := [score for of_step in run.scores.values() for score in of_step]:
        found |= {
            "reward, mean": statistics.fmean(scores),
            "reward, variance": statistics.pvariance(scores),
            "clipped, %": 100 * statistics.fmean(run.clipped.values()) if run.clipped else math.nan,
            "gradient norm": run.mean("train/grad_norm"),
            "entropy": run.mean("train/entropy"),
        }
    return found


def table(runs: Runs) -> str:
    """A row per variant: means over its seeds and their standard errors."""
    found = {name: [numbers(run) for run in some] for name, some in runs.items()}
    columns = list(dict.fromkeys(key for some in found.values() for one in some for key in one))
    lines = ["| run | seeds |" + "".join(f" {name} |" for name in columns)]
    lines += ["|---|---|" + "---|" * len(columns)]
    for name, some in found.items():
        spreads = [Spread.of([one[key] for one in some if key in one]) for key in columns]
        cells = "".join(f" {spread.mean:.3g} ± {spread.error:.2g} |" for spread in spreads)
        lines.append(f"| {name} | {len(some)} |{cells}")
    return "\n".join(lines)


def write(out: Path, ablations: Mapping[str, Sequence[str]]) -> None:
    """Writes ABLATION.png of each ablation, and summary.md."""
    tables = []
    for title, names in ablations.items():
        runs = {name: some for name, some in read_runs(out, names).items() if some}
        if runs:
            draw(runs, title.replace("_", " ")).savefig(out / f"{title}.png", dpi=90)
            tables.append(f"## {title}\n\n{table(runs)}\n")
    (out / "summary.md").write_text("\n".join(tables))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", type=Path, default=HERE / "variants.yaml")
    arguments = parser.parse_args()
    variants: dict[str, Any] = yaml.safe_load(arguments.variants.read_text())
    write(arguments.out, variants["ablations"])


if __name__ == "__main__":
    main()

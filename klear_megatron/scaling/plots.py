"""The pictures of an experiment: what was measured beside what was planned."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from klear_megatron.scaling.results import MEASURED, Row, label

PANELS = {
    "tokens_per_second_per_gpu": ("tokens/s per rank", 1.0),
    "mfu": ("MFU", 1.0),
    "memory_bytes": ("peak memory of a rank, GiB", 2.0**30),
    "seconds": ("seconds per optimizer step", 1.0),
}
"""Column -> its title, and the unit that it is divided by."""


def curves(rows: Sequence[Row], value: str) -> dict[str, list[tuple[int, float]]]:
    """Layout and variant -> (length, value) of each measured point, the shortest first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["outcome"] == MEASURED:
            found.setdefault(label(row), []).append((row["length"], row[value]))
    return {name: sorted(curve) for name, curve in found.items()}


def over_ranks(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Length and variant -> (ranks, tokens per second of all ranks), by the fastest layout of each
    number of ranks; only those with several numbers of ranks."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["outcome"] == MEASURED:
            speeds = found.setdefault(f"{row['length']:,} tokens, {row['variant']}", {})
            total = row["tokens_per_second_per_gpu"] * row["ranks"]
            speeds[row["ranks"]] = max(total, speeds.get(row["ranks"], 0.0))
    return {name: sorted(speeds.items()) for name, speeds in found.items() if len(speeds) > 1}


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Writes scaling.png, and ranks.png if there are points with several numbers of ranks."""
    _draw_lengths(rows).savefig(folder / "scaling.png", dpi=110)
    if scaled := over_ranks(rows):
        _draw_ranks(scaled).savefig(folder / "ranks.png", dpi=110)


def _draw_lengths(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(11, 8), layout="constrained")
    names = list(dict.fromkeys(label(row) for row in rows))
    colors = dict(zip(names, mpl.color_sequences["tab20"] * (len(names) // 20 + 1), strict=False))
    axes = figure.subplots(2, 2)
    for axis, (value, (title, unit)) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set(title=title, yscale="linear" if value == "mfu" else "log")
        _label_powers(axis, "tokens per sequence", {row["length"] for row in rows})
        for column, style in ((value, "o-"), (f"planned_{value}", "--")):
            for name, curve in curves(rows, column).items():
                lengths, values = zip(*curve, strict=True)
                axis.plot(lengths, [v / unit for v in values], style, color=colors[name])
        _mark_lost(axis, rows, colors)
    lines = [Line2D([], [], color=colors[name], label=name) for name in names]
    figure.legend(handles=lines, loc="outside lower center", ncols=4)
    figure.suptitle("solid: measured; dashed: planned; x: out of memory, out of time, or failed")
    return figure


def _mark_lost(axis: Any, rows: Sequence[Row], colors: dict[str, Any]) -> None:
    """A cross at the bottom for each point without a measurement, side by side."""
    names = list(colors)
    for row in rows:
        if row["outcome"] != MEASURED:
            height = 0.03 + 0.04 * names.index(label(row))
            place = axis.get_xaxis_transform()
            axis.plot(row["length"], height, "x", color=colors[label(row)], transform=place)


def _draw_ranks(scaled: dict[str, list[tuple[int, float]]]) -> Figure:
    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    for name, curve in scaled.items():
        ranks, speeds = zip(*curve, strict=True)
        (line,) = axis.plot(ranks, speeds, "o-", label=name)
        ideal = [speeds[0] * n / ranks[0] for n in ranks]
        axis.plot(ranks, ideal, ":", color=line.get_color(), alpha=0.6)
    axis.set(ylabel="tokens/s of all ranks", yscale="log")
    _label_powers(axis, "ranks", {n for curve in scaled.values() for n, _ in curve})
    axis.set_title("solid: measured; dotted: if speed grew with the ranks")
    axis.legend(fontsize="x-small")
    return figure


def _label_powers(axis: Any, title: str, values: set[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(values), [f"{value:,}" for value in sorted(values)])
    axis.set_xlabel(title)
    axis.grid(alpha=0.3)

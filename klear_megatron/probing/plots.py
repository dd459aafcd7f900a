"""Pictures of one or several probes, to compare a model before and after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draws loss against position of all probes, and a map of each needle test.

    Args:
        results: name -> what `probe.json` holds.
    """
    maps = {name: result["needle"] for name, result in results.items() if "needle" in result}
    columns = max(1, len(maps))
    figure = Figure(figsize=(4.2 * columns + 1, 8 if maps else 4), layout="constrained")
    grid = figure.add_gridspec(2 if maps else 1, columns)
    axis = figure.add_subplot(grid[0, :])
    for name, result in results.items():
        rows = result["positions"]
        middles = [(row["start"] + row["end"]) / 2 for row in rows]
        axis.plot(middles, [row["perplexity"] for row in rows], "o-", ms=3, label=name)
    axis.set(xlabel="position in the sequence", ylabel="perplexity", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3)
    if len(results) > 1:
        axis.legend()
    for column, (name, rows) in enumerate(maps.items()):
        _draw_map(figure.add_subplot(grid[1, column]), name, rows)
    figure.savefig(path, dpi=110)


def _draw_map(axis: Any, name: str, rows: list[dict[str, Any]]) -> None:
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    accuracy = {(row["depth"], row["length"]): row["accuracy"] for row in rows}
    table = [[accuracy[depth, length] for length in lengths] for depth in depths]
    axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize="small")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(
        title=f"needle found: {name}" if name else "needle found", xlabel="tokens", ylabel="depth"
    )

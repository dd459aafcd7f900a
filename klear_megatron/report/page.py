"""Puts the page together: data, scripts and the plotting library in one HTML file."""

import base64
import gzip
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from klear_megatron.observability import RolloutFiles
from klear_megatron.platform.files import write_atomically
from klear_megatron.report.account import account
from klear_megatron.report.evaluations import read_evaluations
from klear_megatron.report.plans import read_plans
from klear_megatron.report.rollouts import distributions, sample
from klear_megatron.report.runs import Run, differences, find_runs

_SCRIPTS = ("page.js", "sections.js", "plans.js", "evaluations.js", "rollouts.js", "start.js")


def write_report(
    paths: Sequence[Path], out: Path, *, rollouts: int = 2000, price: float | None = None
) -> None:
    """Writes the page of some runs, which replaces `out` once it is complete.

    Args:
        paths: folders of runs, or folders whose runs are meant.
        rollouts: as many responses can be looked through, spread evenly over runs and steps.
        price: of a GPU hour.

    Raises:
        UserError: a path holds no run, or a run's files cannot be read.
    """
    runs = find_runs(paths)
    evaluations, notes = read_evaluations(runs)
    dumps = [RolloutFiles(run.folder) for run in runs]
    drawing = [number for number, files_of_run in enumerate(dumps) if files_of_run.steps()]
    browsed = [
        row
        for number in drawing
        for row in sample(dumps[number], runs[number], number, rollouts // len(drawing))
    ]
    data = {
        "runs": [
            _run(run) | {"distributions": distributions(files_of_run)}
            for run, files_of_run in zip(runs, dumps, strict=True)
        ],
        "differences": differences(runs),
        "account": account(runs, price),
        "evaluations": evaluations,
        "plans": read_plans(runs),
        "rollout_note": (
            "The first responses of each step. Choose one to read it; "
            "the arrow keys go to the next one."
        ),
        "notes": notes,
    }
    here = files("klear_megatron.report") / "page"
    page = Template((here / "page.html").read_text()).substitute(
        title=_title(paths, runs),
        style=(here / "style.css").read_text(),
        plotly=get_plotlyjs(),
        data=_inert(json.dumps(data)),
        rollouts=_packed(browsed),
        script="\n".join((here / name).read_text() for name in _SCRIPTS),
    )
    with write_atomically(out) as file:
        file.write(page)


def _title(paths: Sequence[Path], runs: Sequence[Run]) -> str:
    if len(runs) < 4:
        return ", ".join(run.name for run in runs)
    return str(paths[0]) if len(paths) == 1 else f"{len(runs)} runs"


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "kind": run.kind,
        "model": run.model,
        "steps": run.steps,
        "curves": run.curves,
        "pictures": [_inline(picture) for picture in run.pictures],
    }


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _inert(text: str) -> str:
    """JSON that cannot end the script element in which it stands."""
    return text.replace("<", "\\u003c")


def _packed(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    return base64.b64encode(gzip.compress(json.dumps(rows).encode())).decode()

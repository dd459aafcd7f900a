"""A real experiment: points under torchrun, one of which runs out of memory, and one of time."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import run_command
from tests.models import tiny

SHORT, LONG = 1024, 8192


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has run: 1,024 tokens on one rank and on two, and more than fit."""
    folder = tmp_path_factory.mktemp("scaling")
    model = tiny.write(
        folder / "model", tiny.qwen3(num_hidden_layers=2, max_position_embeddings=LONG)
    )
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "policy": {"path": str(model), "dtype": "float32", "tokens_per_micro_batch": SHORT}
        | {"optimizer": {"lr": 1e-3}},
        "lengths": [SHORT, LONG],
        "layouts": {
            "one": {"ranks": 1},
            "cp2": {"ranks": 2, "parallel": {"context_parallel_size": 2}, "lengths": [SHORT]},
        },
        "tokens_per_step": 2 * SHORT,
        "steps": 2,
        "memory_limit_gib": 0.05,
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    result = run_command("scaling", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    return path


@pytest.fixture(scope="module")
def rows(experiment: Path) -> dict[str, dict[str, Any]]:
    lines = (experiment.parent / "run" / "results.jsonl").read_text().splitlines()
    return {f"{row['length']} {row['layout']}": row for row in map(json.loads, lines)}


def test_each_point_is_a_result_whatever_became_of_it(rows):
    assert {name: row["outcome"] for name, row in rows.items()} == {
        f"{SHORT} one": "measured",
        f"{SHORT} cp2": "measured",
        f"{LONG} one": "out of memory",
    }
    assert "more than 0.05 GiB" in rows[f"{LONG} one"]["reason"]


@pytest.mark.parametrize("layout", ["one", "cp2"])
def test_memory_is_nearly_what_was_planned_and_speeds_belong_together(rows, layout):
    row = rows[f"{SHORT} {layout}"]
    assert 0.7 < row["memory_bytes"] / row["planned_memory_bytes"] < 1.05
    assert len(row["step_seconds"]) == 2
    speed = 2 * SHORT / row["seconds"] / row["ranks"]
    assert row["tokens_per_second_per_gpu"] == pytest.approx(speed)
    times_planned = row["planned_seconds"] / row["seconds"]
    assert row["mfu"] == pytest.approx(row["planned_mfu"] * times_planned)


def test_tables_and_pictures_are_complete(experiment, rows):
    run = experiment.parent / "run"
    with (run / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["outcome"] for row in table] == [row["outcome"] for row in rows.values()]
    assert [row["seconds"] for row in table] == [
        str(row.get("seconds", "")) for row in rows.values()
    ]
    assert "| 1,024 | 2 | cp2, base |" in (run / "summary.md").read_text()
    for name in ("scaling.png", "ranks.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_a_resumed_experiment_measures_nothing_again_unless_its_settings_changed(experiment):
    points = experiment.parent / "run" / "points"
    before = {path.name: path.stat().st_mtime_ns for path in points.iterdir()}
    (experiment.parent / "run" / "scaling.png").unlink()
    assert run_command("scaling", str(experiment)).returncode == 0
    assert (experiment.parent / "run" / "scaling.png").exists()
    assert {path.name: path.stat().st_mtime_ns for path in points.iterdir()} == before
    late = run_command(
        "scaling", str(experiment), "--time_limit_s", "0.2", "--lengths", f"[{SHORT}]"
    )
    assert late.returncode == 0, late.stderr
    assert late.stdout.count("out of time: not finished after 0.2 s") == 2

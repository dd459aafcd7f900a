"""The ablations in their small form: real runs, which share a real server."""

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.commands import ROOT, environment
from tests.files import read_rows

HERE = ROOT / "examples" / "ablations"
ROW = {"step": 1, "reward/mean": -0.5, "reward/accuracy": 0.25}


def pretend_to_have_run(folder: Path) -> None:
    """Leaves what a finished run would have left."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "finished.json").write_text("{}")


def test_the_ablations_run_what_is_not_finished_and_compare_all(tmp_path):
    equal = tmp_path / "rl" / "keep-equal"
    pretend_to_have_run(equal / "seed_2")
    variants = HERE / "small.yaml"
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), str(tmp_path), "--variants", str(variants)],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The checkpoint, two fine-tunings with an evaluation each, and the other seed of RL.
    assert len(re.findall(r": \d+ s\n", done.stdout)) == 6
    assert read_rows(equal / "seed_2" / "metrics.jsonl") == [ROW]
    # Nothing is right yet, so all groups are of equals, and they are trained on.
    rows = read_rows(equal / "seed_1" / "metrics.jsonl")
    assert [row["groups/trained"] for row in rows] == [2, 2]
    config = yaml.safe_load((equal / "seed_1" / "config.yaml").read_text())
    assert (config["seed"], config["steps"]) == (1, 2)
    summary = (tmp_path / "summary.md").read_text()
    # Of 0 and 25 % right answers the mean is 12.5 %, and its standard error, too.
    assert "| keep-equal | 2 | 12.5 ± 12 |" in summary
    assert "| top-1 | 2 | 0 ± 0 |" in summary
    for picture in ("sources", "equal_groups"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")

"""The recipe of the whole paper on a real Slurm through the real nemo-run."""

import json

from tests.commands import run_command
from tests.launch.conftest import wait_for


def test_from_a_base_model_to_a_released_folder(pipeline):
    """Math RL has two trainer nodes and a rollout node; `whole_paper` says what code RL has."""
    runs = pipeline

    def ended() -> bool:
        codes = [
            json.loads(file.read_text())["code"] for file in runs.glob("*/launch/*/outcome.json")
        ]
        assert set(codes) <= {0, 75}
        return len(codes) == 11

    wait_for(ended, 500)
    released = runs / "Klear-Reasoner-8B"
    assert {"README.md", "SHA256SUMS", "model.safetensors"} <= {
        file.name for file in released.iterdir()
    }
    assert json.loads((runs / "eval" / "results.json").read_text())
    for name, steps in (("math_rl", [1, 2]), ("code_rl", [1, 2])):
        rows = (runs / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == steps
    nodes = {log.stem for log in (runs / "math_rl").glob("launch/*/*-node*.log")}
    assert len(nodes) == 3
    for name, serving in (("math_rl", "math_rl"), ("code_rl", "serve")):
        (registered,) = (runs / serving).glob("launch/*/servers/*.json")
        for attempt in (runs / name).glob("launch/*/attempt.json"):
            assert json.loads(attempt.read_text())["urls"] == json.loads(registered.read_text())
    logs = (runs / "code_rl").glob("launch/*/trainer-*.log")
    first, second = (log.read_text() for log in sorted(logs, key=lambda log: log.stat().st_mtime))
    assert "told to stop: step 1 is saved" in first
    assert "told to stop" not in second
    (snapshot,) = (runs / "math_rl").glob("launch/snapshots/*")
    assert json.loads((snapshot / "code.json").read_text())["version"]
    cancelled = run_command("cancel", str(runs / "serve"))
    assert cancelled.stdout.startswith("cancelled"), cancelled.stderr

"""RL that draws ahead of training, against a real server, is killed and goes on."""

import json
import os
import subprocess
import sys

from tests.commands import ROOT, environment
from tests.documented import undocumented
from tests.files import read_rows


def test_stale_tokens_stay_within_the_bound_and_no_prompt_is_lost_by_a_kill(
    make_config, quickstart, tmp_path
):
    config = make_config(
        "rl",
        rewards={"custom": [{"function": "tests.even_reward:even"}], "workers": 1},
        sampling={"temperature": 1.0, "max_response_length": 190},
        loss={"name": "gppo", "tis_clip": 2.0},
        prompts_per_step=4,
        prompts_per_mini_batch=2,
        max_generation_batches=2,
        max_staleness=1,
        save_every=1,
        steps=8,
    )
    run_dir = tmp_path / "rl"
    tool = [sys.executable, str(ROOT / "tools" / "kill_training.py"), str(config), "--kills", "1"]
    tool += ["--policy.path", str(quickstart / "base")]
    killed = subprocess.run(
        tool,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert killed.returncode == 0, killed.stderr
    counts = json.loads(killed.stdout[killed.stdout.index("{") :])
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert undocumented(rows) == []
    assert counts["trained"] == sum(row["groups/trained"] for row in rows)
    assert {row["rollout/staleness_max"] for row in rows} == {0, 1}
    # Some responses were begun with one version and went on with the next.
    assert max(row["rollout/versions_per_response"] for row in rows) > 1
    for step in range(1, 9):
        for dump in (run_dir / "rollouts").glob(f"step_{step:08}_*.jsonl"):
            versions = {int(row["weight_version"]) for row in read_rows(dump)}
            assert versions <= {step - 2, step - 1}

"""Evaluations of the quickstart's base model through one real server."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from klear_megatron.errors import UserError
from klear_megatron.evaluation import EvalConfig, Scores, compare_runs, evaluate, regrade
from klear_megatron.evaluation.yarn import extend_context
from klear_megatron.models.hf_checkpoint import read_config
from klear_megatron.rollout import serving

ROOT = Path(__file__).parents[2]
PROBLEMS, SAMPLES = 24, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvalConfig]:
    """Of an evaluation that takes seconds, by a server that is there already."""
    folder = tmp_path_factory.mktemp("evaluation")
    script = ROOT / "examples" / "quickstart" / "prepare.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=120)
    text = (ROOT / "examples" / "quickstart" / "eval.yaml").read_text()
    values = yaml.safe_load(text.replace("runs/quickstart", str(folder)))
    heldout = (folder / "heldout.jsonl").read_text().splitlines(keepends=True)
    (folder / "heldout.jsonl").write_text("".join(heldout[:PROBLEMS]))
    values["samples_per_problem"] = SAMPLES
    values["sampling"]["max_response_length"] = 32
    config = EvalConfig.model_validate(values)
    # YaRN changes nothing that is asserted here, but SGLang has to take it.
    plain = config.rollout.model_copy(update={"context_length": None, "start_timeout_s": 240})
    extended = extend_context(plain, read_config(config.model), 2)
    with serving(extended, config.model, folder / "logs") as urls:
        told = httpx.get(f"{urls[0]}/get_server_info", timeout=30).json()
        assert told["context_length"] == 512
        # Two problems at a time, so that it can be killed between them.
        rollout = {"urls": urls, "max_running_requests": 2 * SAMPLES}
        yield EvalConfig.model_validate(values | {"rollout": rollout, "rewards": {"workers": 1}})


@pytest.fixture(scope="module")
def killed_and_resumed(config: EvalConfig) -> tuple[list[str], Scores]:
    """The lines that the killed evaluation left, and the scores of the resumed one."""
    path = config.run_dir.parent / "killed.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    responses = config.run_dir / "responses.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "klear_megatron", "eval", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 60
        while not responses.exists() or responses.read_bytes().count(b"\n") < 3 * SAMPLES:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    left = responses.read_text().splitlines(keepends=True)
    assert len(left) < PROBLEMS * SAMPLES
    whole = len(left) // SAMPLES * SAMPLES
    # Wherever it was hit, now it was in the middle of a problem's samples, and of a line.
    begun = {json.loads(line)["index"] for line in left[:whole]}
    other = min(set(range(PROBLEMS)) - begun)
    half_a_problem = json.dumps(json.loads(left[0]) | {"index": other}) + "\n"
    responses.write_text("".join(left[:whole]) + half_a_problem + left[0][:-20])
    return left[:whole], evaluate(config)


def rows_of(config: EvalConfig) -> list[dict[str, Any]]:
    lines = (config.run_dir / "responses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_killed_evaluation_goes_on_where_it_was(config, killed_and_resumed):
    left, scores = killed_and_resumed
    rows = rows_of(config)
    assert Counter(row["index"] for row in rows) == dict.fromkeys(range(PROBLEMS), SAMPLES)
    drawn_before = Counter(json.loads(line)["response"] for line in left)
    assert drawn_before <= Counter(row["response"] for row in rows)
    for row in rows:
        problem = json.loads((config.data.path).read_text().splitlines()[row["index"]])
        assert row["prompt"] == problem["prompt"]
        assert row["ground_truth"] == problem["reward_model"]["ground_truth"]
    assert scores.problems == PROBLEMS
    assert scores.samples_per_problem == SAMPLES
    assert scores.truncated == pytest.approx(
        sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    )
    assert scores.length_mean == pytest.approx(sum(row["tokens"] for row in rows) / len(rows))


def test_a_finished_evaluation_draws_nothing_and_grades_the_same(config, killed_and_resumed):
    before = (config.run_dir / "responses.jsonl").read_bytes()
    # No server answers there; none is needed.
    elsewhere = config.rollout.model_copy(update={"urls": ["http://127.0.0.1:9"]})
    assert evaluate(config.model_copy(update={"rollout": elsewhere})) == killed_and_resumed[1]
    assert (config.run_dir / "responses.jsonl").read_bytes() == before


def test_regrading_is_grading_and_counts_what_is_right(config, killed_and_resumed, tmp_path):
    rows = rows_of(config)
    results = json.loads((config.run_dir / "results.json").read_text())
    for name in ("settings.json", "config.yaml"):
        (tmp_path / name).write_bytes((config.run_dir / name).read_bytes())

    def regraded(*overrides: str) -> dict[str, Any]:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "responses.jsonl").write_text(text)
        regrade(tmp_path, overrides)
        return json.loads((tmp_path / "results.json").read_text())

    ungraded = [{**row, "reward": None} for row in rows]
    graded, rows = rows, ungraded
    assert regraded() == results
    assert (tmp_path / "responses.jsonl").read_bytes() == (
        config.run_dir / "responses.jsonl"
    ).read_bytes()

    # The first problem is answered right twice and wrong in two ways; the second right once, and
    # wrong twice in one way however written; the model got no other one right.
    assert not any(row["reward"]["correct"] for row in graded)
    answers = [None, None, "1", "2", None, r"\frac{1}{2}", "1/2", "7"]
    for row, answer in zip(rows[: len(answers)], answers, strict=True):
        text = row["ground_truth"] if answer is None else answer
        row["response"] = f"<think></think>\\boxed{{{text}}}"
    scores = regraded("--rewards.math.correct", "5")
    assert scores["accuracy"] == pytest.approx((2 / 4 + 1 / 4) / PROBLEMS)
    assert scores["majority"] == pytest.approx(1 / PROBLEMS)
    assert scores["pass_at_k"] == pytest.approx(
        {"1": 0.75 / PROBLEMS, "2": (5 / 6 + 1 / 2) / PROBLEMS, "4": 2 / PROBLEMS}
    )
    first = json.loads((tmp_path / "responses.jsonl").read_text().splitlines()[0])
    assert first["reward"]["score"] == 5
    accuracy, *_ = compare_runs(config.run_dir, tmp_path)
    assert (accuracy.name, accuracy.first) == ("accuracy", 0)
    assert accuracy.paired.difference == accuracy.second == pytest.approx(0.75 / PROBLEMS)
    # Two problems differ, both to the better: so do two of the four combinations of signs.
    assert accuracy.paired.p_value == 0.5

    text = (tmp_path / "responses.jsonl").read_text()
    (tmp_path / "responses.jsonl").write_text(text.replace("What is", "Who is", 1))
    with pytest.raises(UserError, match="not evaluations of the same problems; 1 differ, row 0"):
        compare_runs(config.run_dir, tmp_path)
    with pytest.raises(UserError, match="other --rewards"):
        regrade(tmp_path, ["--seed", "1"])


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"samples_per_problem": 2}, {"sampling": {"temperature": 0.5}}]
)
def test_a_run_dir_of_other_settings_is_refused(config, killed_and_resumed, change):
    changed = EvalConfig.model_validate(config.model_dump() | change)
    with pytest.raises(UserError, match=f"drawn with another {next(iter(change))}"):
        evaluate(changed)


def test_data_that_changed_is_refused(config, killed_and_resumed):
    path = config.data.path
    before = path.read_text()
    path.write_text(before.replace("What is", "Who is", 1))
    with pytest.raises(UserError, match="other problems, row 0"):
        evaluate(config)
    path.write_text(before)


def test_a_model_that_changed_is_refused(config, killed_and_resumed):
    weights = config.model / "model.safetensors"
    before = weights.stat()
    os.utime(weights)
    with pytest.raises(UserError, match="drawn with another weights"):
        evaluate(config)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_is_no_finished_evaluation_cannot_be_graded(tmp_path):
    with pytest.raises(UserError, match="give the run_dir of `klear-megatron eval`"):
        regrade(tmp_path)

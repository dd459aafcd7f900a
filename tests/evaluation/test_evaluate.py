"""Evaluations of the quickstart's base model through one real server."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from klear_megatron.evaluation import EvalConfig, YarnConfig
from klear_megatron.evaluation.benchmark import load_benchmarks
from klear_megatron.evaluation.compare import compare_runs, format_comparison
from klear_megatron.evaluation.evaluate import evaluate, regrade
from klear_megatron.evaluation.scores import Scores
from klear_megatron.evaluation.yarn import extend_context
from klear_megatron.models.tokenizer import read_tokenizer
from klear_megatron.observability import read_usage
from klear_megatron.rewards import RewardPool
from klear_megatron.rl.evaluation import evaluate_policy
from klear_megatron.rollout import Generator, serving
from tests.commands import ROOT, kill_command, prepare_quickstart
from tests.files import read_lines, read_rows

MATH, CODE = "heldout", "doubling"
PROBLEMS, SAMPLES = {MATH: 24, CODE: 2}, {MATH: 4, CODE: 3}
CODE_ROW = {
    "data_source": "coder1_longcot",
    "prompt": [{"role": "user", "content": "Double a number."}],
    "ability": "code",
    "reward_model": {
        "ground_truth": json.dumps({"inputs": ["2\n", "3\n"], "outputs": ["4\n", "6\n"]}),
        "style": "rule",
    },
}
PROGRAM = "<think></think>\n```python\nprint(2 * int(input()))\n```"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvalConfig]:
    """Of an evaluation that takes seconds, by a server that is there already."""
    folder = tmp_path_factory.mktemp("evaluation")
    prepare_quickstart(folder)
    text = (ROOT / "examples" / "quickstart" / "eval.yaml").read_text()
    values = yaml.safe_load(text.replace("runs/quickstart", str(folder)))
    heldout = (folder / "heldout.jsonl").read_text().splitlines(keepends=True)
    (folder / "heldout.jsonl").write_text("".join(heldout[: PROBLEMS[MATH]]))
    (folder / "code.jsonl").write_text(PROBLEMS[CODE] * (json.dumps(CODE_ROW) + "\n"))
    values["benchmarks"][CODE] = {
        "path": str(folder / "code.jsonl"),
        "samples_per_problem": SAMPLES[CODE],
    }
    values["sampling"]["max_response_length"] = 32
    config = EvalConfig.model_validate(values)
    # YaRN changes nothing that is asserted here, but SGLang has to take it.
    plain = config.rollout.model_copy(update={"context_length": None, "start_timeout_s": 240})
    extended = extend_context(plain, read_config(config.model), YarnConfig(factor=2))
    with serving(extended, config.model, folder / "logs") as servers:
        told = httpx.get(f"{servers.urls[0]}/get_server_info", timeout=30).json()
        assert told["context_length"] == 512
        # A few at a time, so that it can be killed between them.
        rollout = {"urls": servers.urls, "max_running_requests": 8}
        yield EvalConfig.model_validate(values | {"rollout": rollout, "rewards": {"workers": 1}})


def responses_of(run_dir: Path, benchmark: str) -> Path:
    return run_dir / "benchmarks" / benchmark / "responses.jsonl"


def rows_of(run_dir: Path, benchmark: str) -> list[dict[str, Any]]:
    return read_rows(responses_of(run_dir, benchmark))


@pytest.fixture(scope="module")
def killed_and_resumed(config: EvalConfig) -> tuple[list[str], dict[str, Scores]]:
    """The lines that the killed evaluation left, and the scores of the resumed one."""
    path = config.run_dir.parent / "killed.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    responses = responses_of(config.run_dir, MATH)
    kill_command("eval", str(path), path=responses, lines=10)
    left = responses.read_bytes().decode(errors="replace").split("\n")
    assert len(left) < PROBLEMS[MATH] * SAMPLES[MATH]
    whole = [line + "\n" for line in left[:-1]]
    # Wherever it was hit, now it was in the middle of a line too, and of a problem's samples.
    if len(whole) % SAMPLES[MATH] == 0:
        whole.pop()
    responses.write_text("".join(whole) + whole[0][:-20])
    responses_of(config.run_dir, CODE).unlink(missing_ok=True)
    return whole, evaluate(config)


def test_a_killed_evaluation_goes_on_where_it_was(config, killed_and_resumed):
    left, scores = killed_and_resumed
    (used,) = read_usage(config.run_dir)  # of the start that was not killed
    everything = sum(
        row["tokens"] for name in (MATH, CODE) for row in rows_of(config.run_dir, name)
    )
    assert used["tokens"] == everything - sum(json.loads(line)["tokens"] for line in left)
    assert used["sequence_tokens"] > used["tokens"]
    assert used["seconds"] > 0
    assert used["servers"] == {"CPU": 1}
    for name in (MATH, CODE):
        rows = rows_of(config.run_dir, name)
        expected = dict.fromkeys(range(PROBLEMS[name]), SAMPLES[name])
        assert Counter(row["index"] for row in rows) == expected
        assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
        problems = config.benchmarks[name].path.read_text().splitlines()
        for row in rows:
            problem = json.loads(problems[row["index"]])
            assert row["prompt"] == problem["prompt"]
            assert row["ground_truth"] == problem["reward_model"]["ground_truth"]
        assert scores[name].problems == PROBLEMS[name]
        assert scores[name].samples_per_problem == SAMPLES[name]
        cut = sum(row["finish_reason"] == "length" for row in rows)
        assert scores[name].truncated == pytest.approx(cut / len(rows))
        tokens = sum(row["tokens"] for row in rows)
        assert scores[name].length_mean == pytest.approx(tokens / len(rows))
    drawn_before = Counter(
        (json.loads(line)["index"], json.loads(line)["response"]) for line in left
    )
    drawn = Counter((row["index"], row["response"]) for row in rows_of(config.run_dir, MATH))
    assert drawn_before <= drawn
    assert scores[MATH].majority == 0
    assert scores[CODE].majority is None


def test_servers_of_a_resumed_evaluation_have_seeds_of_their_own(
    config, killed_and_resumed, tmp_path
):
    # With the seed of the servers before, they draw the same responses again.
    shutil.copytree(config.run_dir, tmp_path / "run")
    lines = read_lines(responses_of(tmp_path / "run", MATH))
    responses_of(tmp_path / "run", MATH).write_text("".join(lines[:10]))
    stored = 10 + PROBLEMS[CODE] * SAMPLES[CODE]
    # In place of SGLang, what prints its command line and ends.
    rollout = {"python": "/bin/echo", "num_servers": 2}
    values = config.model_dump() | {"run_dir": tmp_path / "run", "rollout": rollout}
    with pytest.raises(UserError, match=f"--random-seed {2 * stored} "):
        evaluate(EvalConfig.model_validate(values))


def test_a_finished_evaluation_draws_nothing_and_grades_the_same(config, killed_and_resumed):
    before = responses_of(config.run_dir, MATH).read_bytes()
    # No server answers there; none is needed.
    elsewhere = config.rollout.model_copy(update={"urls": ["http://127.0.0.1:9"]})
    assert evaluate(config.model_copy(update={"rollout": elsewhere})) == killed_and_resumed[1]
    assert responses_of(config.run_dir, MATH).read_bytes() == before


def test_regrading_is_grading_and_counts_what_is_right(config, killed_and_resumed, tmp_path):
    shutil.copytree(config.run_dir, tmp_path / "run")
    run_dir = tmp_path / "run"
    math_rows, code_rows = rows_of(run_dir, MATH), rows_of(run_dir, CODE)

    def regraded(*overrides: str) -> dict[str, Any]:
        for name, rows in ((MATH, math_rows), (CODE, code_rows)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            responses_of(run_dir, name).write_text(text)
        regrade(run_dir, overrides)
        return json.loads((run_dir / "results.json").read_text())

    assert not any(row["reward"]["correct"] for row in [*math_rows, *code_rows])
    for row in [*math_rows, *code_rows]:
        row["reward"] = None
        row.pop("answer", None)
    assert regraded() == json.loads((config.run_dir / "results.json").read_text())
    for name in (MATH, CODE):
        before = responses_of(config.run_dir, name).read_bytes()
        assert responses_of(run_dir, name).read_bytes() == before

    # The first problem is answered right twice and wrong in two ways; the second right once, and
    # wrong twice in one way however written; the model got no other one right.
    answers = [None, None, "1", "2", None, r"\frac{1}{2}", "1/2", "7"]
    for row, answer in zip(math_rows, answers, strict=False):
        text = row["ground_truth"] if answer is None else answer
        row["response"] = f"<think></think>\\boxed{{{text}}}"
    code_rows[0]["response"] = PROGRAM
    results = regraded("--rewards.math.correct", "5")
    problems = PROBLEMS[MATH]
    assert results[MATH]["accuracy"] == pytest.approx((2 / 4 + 1 / 4) / problems)
    assert results[MATH]["majority"] == pytest.approx(1 / problems)
    assert results[MATH]["pass_at_k"] == pytest.approx(
        {"1": 0.75 / problems, "2": (5 / 6 + 1 / 2) / problems, "4": 2 / problems}
    )
    assert rows_of(run_dir, MATH)[0]["reward"]["score"] == 5
    assert results[CODE]["accuracy"] == pytest.approx(1 / 3 / PROBLEMS[CODE])
    assert results[CODE]["pass_at_k"] == pytest.approx({"1": 1 / 6, "2": 2 / 3 / 2})

    compared = compare_runs(config.run_dir, run_dir)
    assert list(compared) == [MATH, CODE]
    accuracy = compared[MATH][0]
    assert (accuracy.name, accuracy.first) == ("accuracy", 0)
    assert accuracy.paired.difference == accuracy.second == pytest.approx(0.75 / problems)
    # Two problems differ, both to the better: so do two of the four combinations of signs.
    assert accuracy.paired.p_value == 0.5
    table = format_comparison(compared).splitlines()
    assert table[0].split() == [MATH, "A", "B", "B", "-", "A", "std.", "error", "p"]
    assert table[1].split()[:4] == ["accuracy", "0.0%", "3.1%", "+3.1%"]
    assert len({len(line) for line in table if line}) == 1

    text = responses_of(run_dir, MATH).read_text()
    responses_of(run_dir, MATH).write_text(text.replace("What is", "Who is", 1))
    with pytest.raises(UserError, match=f"{MATH} is not of the same problems; 1 differ, row 0"):
        compare_runs(config.run_dir, run_dir)
    with pytest.raises(UserError, match=r"--seed 1: regrading can change only --rewards"):
        regrade(run_dir, ["--seed", "1"])


def test_only_what_both_runs_have_is_compared(config, killed_and_resumed, tmp_path):
    shutil.copytree(config.run_dir, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["benchmarks"]["other"] = values["benchmarks"].pop(MATH)
    path.write_text(yaml.safe_dump(values))
    assert list(compare_runs(config.run_dir, tmp_path / "run")) == [CODE]
    del values["benchmarks"][CODE]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=f"no benchmark in common: {MATH}, {CODE}; and other"):
        compare_runs(config.run_dir, tmp_path / "run")


def test_a_policy_in_training_is_measured_as_its_dumped_responses_say(config, tmp_path):
    tokenizer = read_tokenizer(config.model)
    benchmarks = load_benchmarks(config.benchmarks, tokenizer)
    generator = Generator.for_model(ModelFolder(config.model), config.rollout.urls, config.rollout)
    with RewardPool(config.rewards) as rewards:
        scores = evaluate_policy(
            benchmarks, generator, rewards, tokenizer, config.sampling, tmp_path / "step_1"
        )
    for name in (MATH, CODE):
        rows = read_rows(tmp_path / "step_1" / f"{name}.jsonl")
        expected = dict.fromkeys(range(PROBLEMS[name]), SAMPLES[name])
        assert Counter(row["index"] for row in rows) == expected
        tokens = sum(row["tokens"] for row in rows)
        metrics = scores[name].metrics()
        assert metrics["length_mean"] == pytest.approx(tokens / len(rows))
        correct = sum(row["reward"]["correct"] for row in rows)
        assert metrics["avg"] == pytest.approx(correct / len(rows))
    assert {"pass_at_4", "majority"} < scores[MATH].metrics().keys()
    assert "pass_at_2" in scores[CODE].metrics()
    assert "majority" not in scores[CODE].metrics()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"seed": 1}),
        ("sampling", {"sampling": {"temperature": 0.5}}),
        (
            "samples_per_problem",
            {"benchmarks": {MATH: {"path": "heldout.jsonl", "samples_per_problem": 2}}},
        ),
    ],
)
def test_a_run_dir_of_other_settings_is_refused(config, killed_and_resumed, name, change):
    values = config.model_dump() | change
    if "benchmarks" in change:
        values["benchmarks"][MATH]["path"] = config.benchmarks[MATH].path
        values["benchmarks"][MATH]["max_prompt_length"] = 64
    with pytest.raises(UserError, match=f"drawn with another {name} "):
        evaluate(EvalConfig.model_validate(values))


def test_data_that_changed_is_refused(config, killed_and_resumed):
    path = config.benchmarks[MATH].path
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


def test_what_is_no_finished_evaluation_cannot_be_graded(config, killed_and_resumed, tmp_path):
    with pytest.raises(UserError, match="give the run_dir of `klear-megatron eval`"):
        regrade(tmp_path)
    (tmp_path / "config.yaml").write_text("policy: {path: base}\nsteps: 2\n")  # of a training run
    with pytest.raises(UserError, match=f"{tmp_path}: no evaluation there"):
        compare_runs(config.run_dir, tmp_path)
    shutil.copytree(config.run_dir, tmp_path / "run")
    lines = read_lines(responses_of(tmp_path / "run", CODE))
    responses_of(tmp_path / "run", CODE).write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="has 5 responses, and more are wanted"):
        regrade(tmp_path / "run")


def test_a_budget_that_no_server_takes_is_refused_before_one_is_started(config, tmp_path):
    values = config.model_dump() | {"run_dir": tmp_path, "rollout": {"python": "/nowhere"}}
    longest = 256 - longest_prompt(config)
    fits = EvalConfig.model_validate(values | {"sampling": {"max_response_length": longest}})
    with pytest.raises(UserError, match="/nowhere does not exist"):
        evaluate(fits)
    too_long = {"sampling": {"max_response_length": longest + 1}}
    with pytest.raises(UserError, match="make 257, but the servers take 256"):
        evaluate(EvalConfig.model_validate(values | too_long))
    # Nor one that the servers which run already say they do not take.
    urls = {"rollout": config.rollout, "sampling": {"max_response_length": longest + 257}}
    with pytest.raises(UserError, match="make 513, but the servers take 512"):
        evaluate(EvalConfig.model_validate(values | urls))


def longest_prompt(config: EvalConfig) -> int:
    benchmarks = load_benchmarks(config.benchmarks, read_tokenizer(config.model))
    return max(len(ids) for benchmark in benchmarks for ids in benchmark.loaded.token_ids)

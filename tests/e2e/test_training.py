"""The trainers from the command line: real ranks, a real server, and a process that is killed."""

import argparse
import contextlib
import json
import math
import subprocess
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from klear_megatron.config import load_config
from klear_megatron.observability import RolloutFiles, read_usage
from klear_megatron.rl import show
from klear_megatron.rl.config import RLConfig
from tests.commands import ROOT, command_line, environment, run_command
from tests.distributed.laboratory import RANKS_FORK_WRITERS
from tests.documented import undocumented
from tests.files import read_rows
from tests.servers import servers_among

SMALL = ["--prompts_per_step", "4", "--prompts_per_mini_batch", "2", "--save_every", "1"]
SMALL += ["--export_every", "1"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_rows(run_dir / "metrics.jsonl")


def rollouts(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The responses of all leading ranks."""
    dumps = sorted((run_dir / "rollouts").glob(f"step_{step:08}_*.jsonl"))
    return [row for path in dumps for row in read_rows(path)]


def head(path: Path, rows: int, to: Path) -> Path:
    to.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    return to


def test_no_token_of_the_base_model_has_a_zero_embedding(quickstart):
    # RMSNorm would multiply the gradients of a sampled token by 1/sqrt(eps) = 1000.
    norms = load_file(quickstart / "base" / "model.safetensors")["model.embed_tokens.weight"].norm(
        dim=1
    )
    assert norms.min() > norms.median() / 2


def forks(process: psutil.Process, family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are copies of the process: Megatron's writers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [one for one in family if one.cmdline() == process.cmdline()]
    return []


def test_sft_learns_and_a_resumed_run_is_the_uninterrupted_one(make_config, quickstart, tmp_path):
    config = str(make_config("sft"))
    data = head(quickstart / "sft.jsonl", 32 * 32, tmp_path / "sft.jsonl")
    arguments = ["sft", config, "--data.path", str(data), "--batch_size", "32"]
    whole = run_command(*arguments, "--run_dir", f"{tmp_path}/whole", ranks=2)
    assert whole.returncode == 0, whole.stderr
    assert undocumented(metrics(tmp_path / "whole")) == []
    losses = [row["train/loss"] for row in metrics(tmp_path / "whole")]
    assert ["seconds/save" in row for row in metrics(tmp_path / "whole")] == [False] * 31 + [True]
    assert len(losses) == 32
    assert losses[-1] < losses[0] / 2

    interrupted = [*arguments, "--run_dir", f"{tmp_path}/interrupted", "--save_every", "3"]
    with subprocess.Popen(
        command_line(*interrupted),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as trainer:
        wait_for(tmp_path / "interrupted/checkpoints/step_00000003", trainer)
        parent = psutil.Process(trainer.pid)
        family = parent.children(recursive=True)
        while RANKS_FORK_WRITERS and not forks(parent, family):  # they write the next one
            assert trainer.poll() is None
            family = parent.children(recursive=True)
        trainer.kill()
    assert not psutil.wait_procs(family, timeout=30)[1]
    resumed = run_command(*interrupted, ranks=2)  # and on two ranks instead of one
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert [row["train/loss"] for row in metrics(tmp_path / "interrupted")] == pytest.approx(
        losses, rel=1e-4
    )


def wait_for(path: Path, process: subprocess.Popen[Any], timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name}"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_rl_trains_syncs_dumps_evaluates_and_goes_on_after_it_is_killed(
    make_config, quickstart, tmp_path, capsys
):
    # About half of the answers are right, so every step has groups to learn from.
    rewards = {"custom": [{"function": "tests.even_reward:even"}], "workers": 1}
    config = str(make_config("rl", rewards=rewards))
    arguments = ["rl", config, "--policy.path", str(quickstart / "base"), *SMALL, "--steps", "3"]
    problems = head(quickstart / "heldout.jsonl", 4, tmp_path / "heldout.jsonl")
    evaluation = {
        "every": 2,
        "benchmarks": {"sums": {"path": str(problems), "samples_per_problem": 2}},
        "sampling": {"max_response_length": 64},
    }
    arguments += ["--evaluation", json.dumps(evaluation), "--loss.tis_clip", "2.0"]
    run_dir = tmp_path / "rl"
    with subprocess.Popen(
        command_line(*arguments, ranks=2),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    ) as torchrun:
        wait_for(run_dir / "checkpoints/step_00000001", torchrun, timeout=240)
        family = psutil.Process(torchrun.pid).children(recursive=True)
        assert any("sglang" in " ".join(process.cmdline()) for process in family)
        torchrun.kill()  # and nothing else
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive

    resumed = run_command(*arguments, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert " gradient " in resumed.stdout.split("RL 3/3")[-1].splitlines()[0]
    assert f"klear-megatron show {run_dir} STEP" in resumed.stdout.splitlines()[-2]
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert undocumented(rows) == []
    steps_taken = [math.ceil(row["groups/trained"] / 2) for row in rows[1:]]
    assert [row["progress/optimizer_steps"] for row in rows[1:]] == list(accumulate(steps_taken))
    assert [row["progress/epoch"] * 4096 for row in rows[1:]] == [4, 8, 12]
    assert all(0 < row["throughput/mfu"] < 1 for row in rows[1:])
    used = [(one["first_step"], one["ranks"], one["servers"]) for one in read_usage(run_dir)]
    assert used[0] == (1, {"CPU": 2}, {"CPU": 1})
    assert used[1][0] > 1
    assert used[1][1:] == used[0][1:]
    for row in rows[1:]:
        # Forward is a third of training, and what was trained is among what was drawn.
        assert row["flops/log_probs"] == pytest.approx(row["flops/train"] / 3)
        assert row["flops/generate"] >= row["flops/log_probs"] * (1 - 1e-9)
    # Before the first step, after every second and after the last, with the weights of that step.
    lengths = {row["step"]: row["eval/sums/length_mean"] for row in rows if "eval/sums/avg" in row}
    assert lengths.keys() == {0, 2, 3}
    for step, length_mean in lengths.items():
        path = run_dir / "evaluations" / f"step_{step:08}" / "sums.jsonl"
        responses = read_rows(path)
        assert [row["index"] for row in responses] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert {row["weight_version"] for row in responses} == {str(step)}
        assert sum(row["tokens"] for row in responses) / 8 == pytest.approx(length_mean)
    for row in rows[1:]:
        # The servers computed with the trainer's current weights, in every step and after resuming.
        assert row["rollout/log_prob_difference_max"] < 1e-4
        assert row["train/tis_weight"] == pytest.approx(1, abs=1e-4)
    for step in (1, 2, 3):
        responses = rollouts(run_dir, step)
        assert len(responses) == 4 * 8
        assert {row["weight_version"] for row in responses} == {str(step - 1)}
        assert len({row["index"] for row in responses}) == 4
        # Tokens, log-probabilities and masks of both leaders are each other's.
        tokens = list(RolloutFiles(run_dir).read(step))
        trained = [row for row in tokens if row["mask"] is not None]
        assert len(trained) == 8 * rows[step]["groups/trained"]
        counts = [sum(row["clipped"].count(side) for row in trained) for side in (1, 2)]
        shares = [count / sum(sum(row["mask"]) for row in trained) for count in counts]
        # The metric is the mean over mini-batches of other numbers of tokens.
        names = ("train/clipped_low", "train/clipped_high")
        assert [share > 0 for share in shares] == [rows[step][name] > 0 for name in names]
        differences = [
            abs(server - trainer)
            for row in trained
            for server, trainer in zip(row["rollout_log_probs"], row["old_log_probs"], strict=True)
        ]
        assert sum(differences) / len(differences) == pytest.approx(
            rows[step]["rollout/log_prob_difference_mean"], abs=2e-6
        )
    show.run(argparse.Namespace(run_dir=run_dir, step=2, response=9, token=None))
    shown, row = capsys.readouterr().out.splitlines(), list(RolloutFiles(run_dir).read(2))[9]
    assert [int(line.split()[1]) for line in shown[-row["tokens"] :]] == row["token_ids"]
    show.run(argparse.Namespace(run_dir=run_dir, step=2, response=None, token="<|im_end|>"))
    ended = [i for i, row in enumerate(RolloutFiles(run_dir).read(2)) if 2 in row["token_ids"]]
    found = capsys.readouterr().out.splitlines()[1:]
    assert [int(line.split()[0]) for line in found] == ended
    assert list((run_dir / "tensorboard").iterdir())
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "hf" / "step_00000003")
    converted = run_command("convert", f"{run_dir}/checkpoints/step_00000003", f"{tmp_path}/hf")
    assert converted.returncode == 0, converted.stderr
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, exported.state_dict()[name]), name
    assert load_config(RLConfig, run_dir / "config.yaml").steps == 3


def kill_server_as_it_generates(torchrun: subprocess.Popen[Any], run_dir: Path) -> None:
    """In the second step: once its log tells of tokens after the second push."""
    log = run_dir / "logs" / "sglang_0.log"
    deadline = time.monotonic() + 120
    while (
        len(parts := log.read_text().split("POST /continue_generation")) < 3
        or "Decode batch" not in parts[2]
    ):
        assert torchrun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (server,) = servers_among(psutil.Process(torchrun.pid).children(recursive=True))
    server.kill()


def test_rl_goes_on_with_the_same_weights_after_its_server_is_killed(
    make_config, quickstart, tmp_path
):
    changes = {
        "sampling": {"temperature": 1.0, "max_response_length": 190},
        "rewards": {"custom": [{"function": "tests.even_reward:even"}], "workers": 1},
    }
    config = str(make_config("rl", **changes))
    arguments = ["rl", config, "--policy.path", str(quickstart / "base"), *SMALL, "--steps", "3"]
    # Few at a time, so that it is killed while it generates.
    arguments += ["--rollout.max_running_requests", "16"]
    run_dir, log = tmp_path / "rl", tmp_path / "log.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command_line(*arguments, ranks=2),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
        ) as torchrun,
    ):
        wait_for(run_dir / "rollouts" / "step_00000001_0.jsonl", torchrun, timeout=240)
        try:
            kill_server_as_it_generates(torchrun, run_dir)
            torchrun.wait(240)
        finally:
            torchrun.kill()
    text = log.read_text()
    assert torchrun.returncode == 0, text
    assert "no answer to /generate" in text
    assert text.count("starting this SGLang server again") == 1
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for step, row in enumerate(rows, start=1):
        assert row["rollout/log_prob_difference_max"] < 1e-4
        responses = rollouts(run_dir, step)
        assert len(responses) == 4 * 8
        assert {response["weight_version"] for response in responses} == {str(step - 1)}

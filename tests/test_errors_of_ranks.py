"""Every error of several ranks is printed, the one that all have only once, and at the end."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from klear_megatron.cli import main
from klear_megatron.data import PromptSampler
from klear_megatron.policy.checkpoint import read_state
from tests.commands import ROOT, environment, prepare_quickstart, run_command

ROWS, ROWS_PER_STEP = 8, 4


def write_rows(path: Path, wrong: list[int]) -> Path:
    """Problems, of which the reward function fails at those in `wrong`."""
    rows = [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": f"Problem {i}"}],
            "ability": "math",
            "reward_model": {"ground_truth": "wrong" if i in wrong else "right", "style": "rule"},
        }
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rl_config(folder: Path, wrong: list[int]) -> Path:
    prepare_quickstart(folder)
    config = {
        "run_dir": str(folder / "run"),
        "policy": {"path": str(folder / "base"), "optimizer": {"lr": 1e-6}},
        "data": {"path": str(write_rows(folder / "rows.jsonl", wrong))},
        "steps": 3,
        "prompts_per_step": ROWS_PER_STEP,
        "prompts_per_mini_batch": ROWS_PER_STEP,
        "advantages": {"drop_equal": False},
        "responses_per_prompt": 2,
        "sampling": {"max_response_length": 8},
        "rollout": {"mem_fraction_static": 0.05, "extra_args": ["--max-total-tokens", "4096"]},
        "rewards": {"custom": [{"function": "tests.wrong_reward:nothing"}], "workers": 1},
    }
    path = folder / "rl.yaml"
    path.write_text(json.dumps(config))
    return path


def errors(stderr: str) -> list[tuple[str, str]]:
    return re.findall(r"^error on rank (\d): (.*)$", stderr, re.MULTILINE)


def test_a_mistake_that_all_ranks_find_is_printed_once(tmp_path):
    path = tmp_path / "rl.yaml"
    path.write_text("steps: many\n")
    result = run_command("rl", str(path), ranks=3)
    assert result.returncode == 2
    ((_, message),) = errors(result.stderr)
    assert str(path) in message
    assert result.stderr.rstrip().endswith("given: 'many'")


def test_a_reward_that_fails_in_the_second_step_leaves_the_first_and_is_printed_with_its_rank(
    tmp_path,
):
    sampler = PromptSampler(ROWS, seed=0)
    sampler.next_batch(ROWS_PER_STEP)
    second_leaders = sampler.next_batch(ROWS_PER_STEP)[1::2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "klear_megatron", "rl", str(rl_config(tmp_path, second_leaders))]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    ((rank, message),) = errors(result.stderr)
    # torchrun's own report has it, too.
    assert message in result.stderr.partition("Root Cause")[2]
    assert rank == "1"
    row = re.match(
        r"rewards\.custom\.function: tests\.wrong_reward:nothing returned None for a response to "
        r"row (\d) of the data \(data_source 'mine'\); it has to return a number, "
        r".*; step 1 is saved; run it again to go on",
        message,
    )
    assert row is not None
    assert int(row[1]) in second_leaders
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    state = read_state(saved)
    assert state["step"] == 1
    assert sum(state["sampler"]["drawn"].values()) == ROWS_PER_STEP  # those of step 2 come again


def test_reporting_an_error_leaves_the_process_as_it_was(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sft", "no_such_file.yaml"]) == 2
    assert "no such config file" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_wrong_argument_is_refused_before_ranks_start(capsys):
    with pytest.raises(SystemExit) as end:
        main(["torchrun", "--nproc-per-node=2", "-m", "klear_megatron", "convert", "a", "b", "--x"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --x\n")


def test_a_port_that_is_in_use_is_said(monkeypatch, capfd):
    monkeypatch.setenv("KLEAR_MEGATRON_TORCHRUN", "")  # is set, and set back
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        where = ["--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port", port]
        with pytest.raises(SystemExit) as end:
            main(["torchrun", *where, "sft", "sft.yaml"])
    assert end.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: --master-addr and --master-port, or --rdzv-endpoint: the ranks")
    assert f"port: {port}" in last
    assert last.endswith("address already in use")


def test_an_option_that_is_mistyped_is_no_setting(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "sft.yaml", "--dryrun"])
    assert capsys.readouterr().err.endswith("argument --dryrun; did you mean --dry-run?\n")


def test_a_folder_in_the_place_of_a_config_is_said(tmp_path, capsys):
    assert main(["sft", str(tmp_path)]) == 2
    said = f"error: {tmp_path}: is a folder; give a YAML file, such as {tmp_path}/config.yaml\n"
    assert capsys.readouterr().err == said

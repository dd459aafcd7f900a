"""What `--dry-run` says, and that it leaves nothing behind."""

from pathlib import Path

import pytest

from klear_megatron.cli import main


@pytest.fixture
def dry_run(make_config, quickstart, tmp_path, capsys):
    """Runs a verb dry; returns its exit code, and what it said."""

    def run(verb: str, *arguments: str) -> tuple[int, str]:
        model = ["--policy.path", str(quickstart / "base")] if verb != "eval" else []
        code = main([verb, str(make_config(verb)), "--dry-run", *model, *arguments])
        assert not any(path.is_dir() for path in tmp_path.iterdir())
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def data_of(quickstart: Path, tmp_path: Path, rows: int) -> str:
    path = tmp_path / "rows.jsonl"
    lines = (quickstart / "sft.jsonl").read_text().splitlines()[:rows]
    path.write_text("\n".join([*lines, '{"messages": []}']))
    return str(path)


def test_sft(dry_run, quickstart, tmp_path):
    data = data_of(quickstart, tmp_path, 50)
    arguments = ["--data.path", data, "--data.bad_rows", "skip", "--batch_size", "16"]
    arguments += ["--validation.path", data, "--validation.every", "2"]
    parallel = ["--policy.parallel.tensor_model_parallel_size", "2", "--ranks"]
    code, said = dry_run("sft", *arguments, *parallel, "8")
    assert code == 0
    for line in (
        "data: 50 conversations to train on",
        "data: 1 malformed rows skipped",
        "validation: 50 conversations",
        "steps: 3",
        "ranks: 8 = TP 2 x PP 1 x CP 1 x DP 4",
        "batch_size: 16",
    ):
        assert f"\n{line}\n" in said
    code, said = dry_run("sft", *arguments, *parallel, "3")
    assert code == 2
    assert "policy.parallel: world size 3 is not divisible by TP x PP x CP = 2 x 1 x 1" in said
    code, said = dry_run("sft", "--data.path", data)
    assert code == 2
    assert "rows.jsonl, line 51, field messages" in said


def test_rl(dry_run, quickstart):
    code, said = dry_run("rl")
    assert code == 0
    prompts = len((quickstart / "train.jsonl").read_text().splitlines())
    assert f"\ndata: {prompts} prompts to train on\n" in said
    assert "\nservers: 1, each with TP 1\n" in said
    code, said = dry_run("rl", "--rewards.custom", "[{function: 'json:dumps'}]")
    assert code == 2
    assert "json:dumps" in said


def test_eval(dry_run):
    code, said = dry_run("eval")
    assert code == 0
    assert "responses, of which 0 are stored already" in said

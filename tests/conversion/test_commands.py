"""What `convert`, `verify` and `release` take from the command line."""

import shutil
from pathlib import Path

import pytest

from klear_megatron.cli import main
from klear_megatron.conversion import hf_to_megatron
from tests.conversion.folders import same_weights, weights_of
from tests.models import tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has written two checkpoints and was killed while writing a third; the Hugging
    Face models that they are of are beside it."""
    folder = tmp_path_factory.mktemp("commands")
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (9, 10):
        hf = tiny.write(folder / f"hf_{step}", tiny.qwen3(num_hidden_layers=1), seed=step)
        hf_to_megatron(hf, checkpoints / f"step_{step:08}")
    shutil.copytree(checkpoints / "step_00000009", checkpoints / "step_00000011.partial")
    return folder / "run"


def test_run_folder_stands_for_its_latest_complete_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(run_dir), str(tmp_path / "out")]) == 0
    assert f"{run_dir}: its latest checkpoint is step_00000010\n" in capsys.readouterr().out
    assert same_weights(weights_of(tmp_path / "out"), weights_of(run_dir.parent / "hf_10"))
    assert main(["verify", str(run_dir.parent / "hf_10"), str(run_dir)]) == 0
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(run_dir), str(run_dir.parent / "hf_9")])


def test_run_without_a_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for verb in (["convert"], ["release", "--licence", "mit"]):
        assert main([*verb, str(tmp_path / "run"), str(tmp_path / "out")]) == 2
        assert f"{tmp_path / 'run'}: no complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("tp", ["1", "2"])
def test_tensor_parallelism_is_refused_where_it_means_nothing(
    tp: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(run_dir), str(tmp_path / "out"), "--tp", tp]) == 2
    assert f"--tp {tp}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_tensor_parallel_ranks_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = run_dir.parent / "hf_9"
    assert main(["convert", str(hf), str(tmp_path / "out"), "--tp", "0"]) == 2
    assert "at least 1 is needed" in capsys.readouterr().err

"""What `convert`, `verify` and `release` take from the command line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.cli import main
from klear_megatron.conversion import hf_to_megatron
from klear_megatron.conversion.staging import Staging
from klear_megatron.conversion.verify import compare_weights
from klear_megatron.errors import UserError
from tests.conversion.folders import same_weights, weights_of
from tests.models import tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that wrote two checkpoints and was killed while writing a third.

    The Hugging Face models of the checkpoints lie beside the run.
    """
    folder = tmp_path_factory.mktemp("commands")
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (9, 10):
        hf = tiny.write(folder / f"hf_{step}", tiny.qwen3(num_hidden_layers=1), seed=step)
        hf_to_megatron(hf, checkpoints / f"step_{step:08}")
    shutil.copytree(checkpoints / "step_00000009", checkpoints / "step_00000011.partial")
    (checkpoints / "step_00000012").mkdir()  # not a checkpoint
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "0"], "at least 1 is needed"),
        (["--tp", "3"], "num_attention_heads 8 cannot be divided between 3"),
        (["--to", "hf"], "is no Megatron checkpoint"),
    ],
)
def test_what_cannot_be_made_of_it_is_refused(
    options: list[str],
    message: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hf = run_dir.parent / "hf_9"
    assert main(["convert", str(hf), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_outputs_where_none_can_be_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, file = run_dir.parent / "hf_9", tmp_path / "file"
    file.touch()
    assert main(["convert", str(hf), str(hf / "out")]) == 2
    assert f"{hf / 'out'}: is inside {hf}" in capsys.readouterr().err
    assert main(["convert", str(hf), str(file / "out")]) == 2
    assert f"{file / 'out'}: Not a directory" in capsys.readouterr().err
    for size in ("0", "nan", "-1"):
        with pytest.raises(SystemExit, match="2"):
            main(["convert", str(hf), str(tmp_path / "out"), "--shard-size", size])


def test_folder_of_another_kind_is_told_from_one_that_is_not_there(
    run_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_config(tmp_path / "nowhere")
    for megatron in (run_dir, run_dir / "checkpoints" / "step_00000009"):
        with pytest.raises(UserError, match=f"`klear-megatron convert {megatron} OUT`"):
            read_config(megatron)


def test_ctrl_c_ends_a_conversion_that_can_be_resumed(run_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C comes in the middle of torch.save, which turns an exception into another error."""
    hf, out = run_dir.parent / "hf_9", tmp_path / "out"
    script = (
        "import os, signal, sys\n"
        "from klear_megatron.cli import main\n"
        "from klear_megatron.conversion import streamed_file\n"
        "write = streamed_file.StreamedFile.write\n"
        "def interrupted(file, data):\n"
        "    if file.tell() > 50_000:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return write(file, data)\n"
        "streamed_file.StreamedFile.write = interrupted\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["convert", str(hf), str(out), "--shard-size", "0.00004"]
    result = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "interrupted; the same command with --resume goes on\n"
    assert not out.exists()
    assert main([*command, "--resume"]) == 0
    assert compare_weights(hf, out).differing == {}


def test_two_processes_do_not_write_to_the_same_folder(run_dir: Path, tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        staging.begin({}, needed_bytes=0, resume=False)
        for resume in (False, True):
            with pytest.raises(UserError, match="another process is writing there"):
                hf_to_megatron(run_dir.parent / "hf_9", tmp_path / "out", resume=resume)
    hf_to_megatron(run_dir.parent / "hf_9", tmp_path / "out")

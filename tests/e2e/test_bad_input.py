"""Bad input ends a command with one message, exit status 2 and no traceback.

Most commands run in forked processes that have imported Megatron-Core already.
"""

import contextlib
import io
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig

from klear_megatron.cli import main
from tests.commands import run_command
from tests.distributed.ranks import run_ranks


def _main(arguments: tuple[str, ...]) -> tuple[int, str]:
    """The command's exit status and what it said on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return main(arguments), errors.getvalue()


def refusal(*arguments: str) -> str:
    """The one message with which the command refuses."""
    ((status, message),) = run_ranks(1, _main, arguments)
    assert status == 2, message
    assert message.startswith("error: ")
    return message


def doctors_refusal() -> str:
    """As `refusal`, in a process with this one's environment."""
    result = run_command("doctor")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--policy.optimizer.lrr", "1"], "policy.optimizer.lrr: unknown key; did you mean lr?"),
        (["--prompts_per_mini_batch", "64"], "prompts_per_mini_batch (64) is larger than"),
        (["--sampling.top_p", "0.9"], "use top_p 1.0"),
        (["--policy.parallel.tensor_model_parallel_size", "3"], "num_attention_heads = 4 is not"),
        (["--policy.parallel.tensor_model_parallel_size", "2"], "world size 1 is not divisible by"),
        (["--data.path", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        (["--policy.path", "nowhere"], "nowhere: no such folder"),
        (["--sampling.max_response_length", "5000"], "but the servers take 256"),
        (
            [
                "--evaluation",
                "{every: 5, benchmarks: {aime: {path: nowhere.jsonl}}}",
            ],
            "nowhere.jsonl: no such data file",
        ),
        (["--evaluation.every", "5"], "evaluation.benchmarks: missing; give it a value"),
        (["--loss.name", "gpo"], "loss.name: there is no loss 'gpo'"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_rl_refuses(make_config, quickstart, overrides, message):
    base = ["--policy.path", str(quickstart / "base")]
    assert message in refusal("rl", str(make_config("rl")), *base, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--rollout.python", "nowhere"], "rollout.python: nowhere does not exist"),
        (["--loss.name", "nowhere.py:f"], "loss.name: cannot import 'nowhere.py'"),
        (["--rewards.custom", "[nowhere.py:f]"], "custom.function: cannot import 'nowhere.py'"),
        (["--evaluation", "{every: 5, benchmarks: {a: {path: no.jsonl}}}"], "no.jsonl: no such"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_what_needs_no_data_is_refused_before_they_are_read(
    make_config, quickstart, tmp_path, overrides, message
):
    data = tmp_path / "train.jsonl"
    data.write_text("no row\n")
    given = ["--policy.path", str(quickstart / "base"), "--data.path", str(data)]
    assert message in refusal("rl", str(make_config("rl")), *given, *overrides)


def test_sft_refuses_lengths_beyond_the_models_positions(make_config):
    message = refusal("sft", str(make_config("sft")), "--data.max_length", "257")
    assert "data.max_length: 257 tokens, but the model takes 256" in message


def test_model_of_images_is_refused_by_its_architecture(make_config, tmp_path):
    config = Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"])
    config.save_pretrained(tmp_path / "images")
    save_file({"any": torch.zeros(1)}, tmp_path / "images" / "model.safetensors")
    for command in (
        ("sft", str(make_config("sft")), "--policy.path", str(tmp_path / "images")),
        ("convert", str(tmp_path / "images"), str(tmp_path / "out")),
        ("verify", str(tmp_path / "images"), str(tmp_path / "images")),
    ):
        message = refusal(*command)
        assert "unknown architecture 'Qwen2_5_VLForConditionalGeneration'; known: " in message


def test_malformed_row_is_named_by_its_line(make_config, quickstart, tmp_path):
    data = tmp_path / "train.jsonl"
    rows = (quickstart / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join([*rows[:2], '{"data_source": "math_longcot_math_verify"}\n']))
    base = ["--policy.path", str(quickstart / "base")]
    message = refusal("rl", str(make_config("rl")), *base, "--data.path", str(data))
    assert f"{data}, line 3, field prompt" in message


def test_missing_config_ends_the_process_with_one_line_and_no_traceback():
    result = run_command("sft", "nowhere.yaml")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: nowhere.yaml: no such config file")


@pytest.mark.parametrize("verb", ["rl", "eval", "serve"])
def test_run_dir_that_cannot_be_made_is_refused(make_config, quickstart, tmp_path, verb):
    (tmp_path / "file").touch()
    model = str(quickstart / "base")
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {model}\n")
    if verb != "serve":
        config = make_config(verb)
    of = ["--policy.path", model] if verb == "rl" else []
    message = refusal(verb, str(config), "--run_dir", f"{tmp_path}/file/run", *of)
    assert f"error: {tmp_path}/file/run" in message
    assert "cannot be made or written to: Not a directory; choose another folder" in message


def test_serving_what_is_no_checkpoint_is_refused_before_a_server_is_started(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {tmp_path}\nrun_dir: {tmp_path}/run\n")
    assert f"{tmp_path}: no config.json there" in refusal("serve", str(config))
    assert not (tmp_path / "run").exists()


def test_doctor_names_a_wrong_apex_and_a_broken_transformer_engine(tmp_path, monkeypatch):
    for package, code in {
        "apex": "",
        "transformer_engine": "raise OSError('no libcuda.so')",
    }.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
    metadata = tmp_path / "transformer_engine-2.11.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.11.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    message = doctors_refusal()
    assert "the installed `apex` is not NVIDIA's" in message
    assert "Engine 2.11.0 is installed but cannot be used: OSError: no libcuda.so" in message
    monkeypatch.delenv("PYTHONPATH")
    healthy = run_command("doctor")
    assert healthy.returncode == 0
    assert re.search(r"^bubblewrap +works", healthy.stdout, re.MULTILINE)


@pytest.mark.parametrize("there", [False, True], ids=["missing", "broken"])
def test_doctor_says_what_to_do_without_a_working_bubblewrap(tmp_path, monkeypatch, there):
    if there:
        broken = tmp_path / "bwrap"
        broken.write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
        broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    message = doctors_refusal()
    if there:
        assert "bubblewrap does not run here" in message
        assert "no namespaces here" in message
    else:
        assert "apt-get install bubblewrap" in message

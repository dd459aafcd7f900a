"""`verify` finds the differences between two checkpoints, and `--dry-run` prints the plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from klear_megatron.conversion import hf_to_megatron, megatron_to_hf
from klear_megatron.conversion.logits import logits_difference
from klear_megatron.conversion.verify import compare_weights
from klear_megatron.errors import UserError
from tests.models import tiny

COMMANDS = Path(__file__).parents[2] / "checkpoints_conversion"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, `megatron` with the same weights, and `changed` with one number slightly larger."""
    folder = tmp_path_factory.mktemp("verify")
    tiny.write(folder / "hf", tiny.qwen3())
    hf_to_megatron(folder / "hf", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "changed")
    weights = load_file(folder / "changed" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = 1.0
    weights["model.layers.2.mlp.up_proj.weight"][0, 1] += 0.25
    save_file(weights, folder / "changed" / "model.safetensors")
    return folder


def _run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, COMMANDS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_same_weights_have_no_differences(folder: Path) -> None:
    assert not compare_weights(folder / "hf", folder / "megatron").differing
    assert not compare_weights(folder / "megatron", folder / "hf").differing


def test_changed_dtype_and_missing_tensors_are_found(folder: Path, tmp_path: Path) -> None:
    hf_to_megatron(folder / "hf", tmp_path / "bf16", dtype="bfloat16")
    found = compare_weights(folder / "hf", tmp_path / "bf16").differing
    weights = load_file(folder / "hf" / "model.safetensors")
    assert found.keys() == weights.keys()
    norm = weights["model.norm.weight"]
    rounding = (norm - norm.bfloat16()).abs().max().item()
    assert found["model.norm.weight"] == (
        f"float32 and bfloat16, largest difference {rounding:.3g}"
    )

    tiny.write(tmp_path / "tied", tiny.qwen3(tie_word_embeddings=True))
    assert compare_weights(folder / "hf", tmp_path / "tied").differing["lm_head.weight"] == (
        f"only in {folder / 'hf'}"
    )
    assert compare_weights(tmp_path / "tied", folder / "hf").differing["lm_head.weight"] == (
        f"only in {folder / 'hf'}"
    )


def test_zero_and_minus_zero_differ(folder: Path, tmp_path: Path) -> None:
    for name, zero in (("plus", 0.0), ("minus", -0.0)):
        megatron_to_hf(folder / "megatron", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["model.norm.weight"][0] = zero
        save_file(weights, tmp_path / name / "model.safetensors")
    found = compare_weights(tmp_path / "plus", tmp_path / "minus").differing
    assert found == {"model.norm.weight": "float32, largest difference 0"}


def test_command_compares_logits_and_exits_with_one_where_they_differ(folder: Path) -> None:
    same = _run("verify", folder / "megatron", folder / "hf", "--logits")
    assert same.returncode == 0, same.stderr
    count = len(load_file(folder / "hf" / "model.safetensors"))
    assert f"all {count} tensors are the same in every bit" in same.stdout
    assert "logits: relative difference" in same.stdout
    assert "after 140 tokens of 4 prompts" in same.stdout

    other = _run("verify", folder / "megatron", folder / "changed", "--logits")
    assert other.returncode == 1, other.stderr
    table, differing, _, logits = other.stdout.splitlines()
    assert table.startswith("model.layers.2.mlp.up_proj.weight  float32, largest difference ")
    assert differing == f"1 of {count} tensors differ"
    assert float(logits.split()[3].rstrip(",")) > 1e-5


def test_logits_tell_of_a_config_that_is_another(folder: Path, tmp_path: Path) -> None:
    megatron_to_hf(folder / "megatron", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert not compare_weights(folder / "megatron", tmp_path / "hf").differing
    assert logits_difference(folder / "megatron", tmp_path / "hf").relative > 1e-3


def test_command_compares_logits_of_given_prompts(folder: Path, tmp_path: Path) -> None:
    megatron_to_hf(folder / "megatron", tmp_path / "hf")
    tiny.write_tokenizer(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.embed_tokens.weight"][5] += 0.25  # the token of the word w5
    save_file(weights, tmp_path / "hf" / "model.safetensors")

    def relative_difference(*prompts: str) -> float:
        given = [word for prompt in prompts for word in ("--prompt", prompt)]
        result = _run("verify", "--logits", *given, folder / "megatron", tmp_path / "hf")
        assert result.returncode == 1, result.stderr
        return float(result.stdout.splitlines()[-1].split()[3].rstrip(","))

    assert relative_difference("w6 w7", "w8") < 1e-5
    assert relative_difference("w6 w7", "w8 w5") > 1e-3

    empty = _run("verify", folder / "megatron", tmp_path / "hf", "--logits", "--prompt", "")
    assert "prompt '': no tokens" in empty.stderr
    alone = _run("verify", folder / "megatron", tmp_path / "hf", "--prompt", "w2")
    assert "--prompt: is for --logits" in alone.stderr


def test_unreadable_checkpoint_is_no_difference(folder: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        compare_weights(folder / "hf", folder / "nowhere")


def test_dry_run_prints_every_tensor_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = _run("hf_to_megatron", folder / "hf", tmp_path / "out", "--dry-run", "--tp", "2")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
    weights = load_file(folder / "hf" / "model.safetensors")
    for name, tensor in weights.items():
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"  {name} -> "))
        assert line.endswith(f": {list(tensor.shape)} float32, {tensor.nbytes:,} bytes")
    total = sum(tensor.nbytes for tensor in weights.values())
    assert result.stdout.splitlines()[-1] == f"{len(weights)} tensors, 1 files, {total:,} bytes"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_dtype_is_that_of_weights_and_config(
    dtype: str, folder: Path, tmp_path: Path
) -> None:
    megatron_to_hf(folder / "megatron", tmp_path / "out", dtype=dtype)
    original = load_file(folder / "hf" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, original[name].to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype

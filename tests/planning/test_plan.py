"""The verb `plan`: what it prints, what it imports, and what bad input gets."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from klear_megatron.cli import main
from klear_megatron.planning.run import READ_ELSEWHERE, PlannedRun
from klear_megatron.rl.config import RLConfig
from klear_megatron.sft.config import SFTConfig
from tests.models.published import qwen3_8b

QWEN3_8B = qwen3_8b(max_position_embeddings=524288).to_dict()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """An SFT config and its model, of which there is a config.json only."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_8B))
    return _write(tmp_path)


def _write(folder: Path, **changes: Any) -> Path:
    policy = {"path": str(folder / "model"), "optimizer": {"lr": 1e-5}}
    run = {"run_dir": "r", "policy": policy, "data": {"path": "d"}, "batch_size": 64, **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def plan(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> Any:
    assert main(["plan", str(config), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    assert main(["plan", str(config), *arguments]) == 2
    return capsys.readouterr().err


def test_the_names_that_other_programs_read(config, capsys):
    planned = plan(capsys, config, "--gpus", "32", "--policy.parallel.context_parallel_size", "4")
    assert list(planned) == [
        *("layout", "memory_bytes", "fits", "step_seconds"),
        *("tokens_per_second_per_gpu", "model_tflops_per_gpu", "mfu"),
    ]
    assert list(planned["memory_bytes"]) == [
        *("weights", "gradients", "optimizer", "activations", "log_probs", "communication"),
        *("overhead", "total"),
    ]
    assert list(planned["step_seconds"]) == [
        *("compute", "attention", "tensor", "context", "pipeline_bubble", "expert", "data"),
        *("optimizer", "total"),
    ]
    for part in ("memory_bytes", "step_seconds"):
        values = dict(planned[part])
        assert values.pop("total") == pytest.approx(sum(values.values()))
    tokens = 64 * 32768
    seconds = planned["step_seconds"]["total"]
    assert planned["tokens_per_second_per_gpu"] == pytest.approx(tokens / seconds / 32)


def test_an_answer_needs_neither_torch_nor_megatron(config):
    script = (
        "import sys\nfrom klear_megatron.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'transformers', 'megatron'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = ["plan", str(config), "--gpus", "8", "--search"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


def test_longer_sequences_need_context_parallelism(config, capsys):
    """The rules that experts use come out: TP within a node, CP as long as sequences grow, and
    whole layers recomputed only where nothing else fits."""
    sizes = []
    for length, sequences in ((32768, 64), (131072, 64), (524288, 16)):
        arguments = ["--sequence-length", str(length), "--sequences-per-step", str(sequences)]
        best = plan(capsys, config, "--gpus", "256", "--search", *arguments)[0]["layout"]
        assert best["tensor_parallel"] <= 8
        assert best["recompute"] != "full"
        sizes.append(best["context_parallel"] * best["tensor_parallel"])
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_more_context_parallelism_needs_less_memory(config, capsys):
    needs = [
        plan(
            capsys,
            config,
            "--gpus",
            "64",
            "--policy.parallel.context_parallel_size",
            str(cp),
            "--policy.tokens_per_micro_batch",
            str(32768 // cp),
        )["memory_bytes"]["activations"]
        for cp in (1, 2, 4, 8)
    ]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] / needs[-1] == pytest.approx(8, rel=0.2)


def test_a_reference_takes_its_weights_and_a_forward_pass(config, capsys, tmp_path):
    run = yaml.safe_load(config.read_text())
    del run["batch_size"]
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump(run | {"steps": 1}))
    arguments = [
        str(tmp_path / "rl.yaml"),
        "--gpus",
        "64",
        "--sampling.max_response_length",
        "9000",
    ]
    tp = ["--policy.parallel.tensor_model_parallel_size", "4"]
    penalty = ["--loss", '{"kl": {"coeff": 0.1}}']
    without, with_it = (
        plan(capsys, tmp_path / "rl.yaml", *arguments[1:], *tp, *more)["memory_bytes"]
        for more in ([], penalty)
    )
    vectors = 36 * (2 * 4096 + 2 * 128) + 4096  # on every rank
    matrices = 36 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288)
    parameters = (matrices + 2 * 151936 * 4096) / 4 + vectors
    assert with_it.pop("reference") == 2 * parameters
    assert with_it.pop("total") - without.pop("total") == 2 * parameters
    assert with_it == without

    def seconds(*more: str) -> dict[str, float]:
        assert main(["plan", *arguments, *tp, *more]) == 0
        lines = capsys.readouterr().out.split("\nstep\n")[1].splitlines()
        return {line[:17].strip(): float(line.split()[-2]) for line in lines if line[0] == " "}

    assert seconds()["reference"] == 0
    assert seconds(*penalty)["reference"] == seconds()["old log-probs"] > 0
    assert seconds("--old_log_probs", "server")["old log-probs"] == 0


def test_the_search_says_why_the_others_do_not_fit(config, capsys):
    arguments = ["--sequence-length", "524288", "--sequences-per-step", "16"]
    assert main(["plan", str(config), "--gpus", "8", "--search", *arguments]) == 0
    printed = capsys.readouterr().out
    fit, tried = re.match(r"(\d+) of (\d+) layouts fit", printed).groups()
    assert 0 < int(fit) < int(tried)
    assert f"{int(tried) - int(fit)} do not fit even with full recomputation" in printed
    assert "GiB too much" in printed


def test_a_gpu_of_the_users_own(config, capsys, tmp_path):
    assert "did you mean h100?" in error(capsys, config, "--gpus", "8", "--gpu", "h1000")
    own = {
        "memory": 1e9,
        "bandwidth": 1e12,
        "flops": {"float32": 1e13, "bfloat16": 1e14},
        "compute_capability": [9, 0],
        "node_gpus": 8,
        "node_link": 1e11,
        "network": 1e10,
        "sources": "made up",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    assert not plan(capsys, config, "--gpus", "8", "--gpu", str(tmp_path / "own.yaml"))["fits"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own | {"memry": 1}))
    message = error(capsys, config, "--gpus", "8", "--gpu", str(tmp_path / "own.yaml"))
    assert "memry: unknown key; did you mean memory?" in message


def test_bad_input_gets_the_runs_own_messages(config, capsys, tmp_path):
    size = "--policy.parallel.tensor_model_parallel_size"
    assert "world size 12 is not divisible by TP x PP x CP" in error(
        capsys, config, "--gpus", "12", size, "8"
    )
    assert "num_key_value_heads = 8 is not divisible by 16" in error(
        capsys, config, "--gpus", "16", size, "16"
    )
    long = ["--sequence-length", "600000"]
    assert "max_position_embeddings = 524288" in error(capsys, config, "--gpus", "8", *long)
    assert "bacth_size: unknown key; did you mean batch_size?" in error(
        capsys, _write(tmp_path, bacth_size=3), "--gpus", "8"
    )
    unknown = json.dumps(QWEN3_8B | {"architectures": ["MambaForCausalLM"]})
    (tmp_path / "model" / "config.json").write_text(unknown)
    assert "unknown architecture 'MambaForCausalLM'" in error(
        capsys, _write(tmp_path), "--gpus", "8"
    )


def test_a_model_of_the_hub_is_planned_from_its_config_in_the_cache(
    config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (tmp_path / "model").rename(repository / "snapshots" / "abc")
    assert main(["plan", str(config), "--gpus", "8", "--policy.path", "owner/name"]) == 0
    assert "tokens per optimizer step on 8 GPUs" in capsys.readouterr().out


def test_planning_reads_the_runs_own_settings():
    """No default differs from the run's, and every key is one of the run's."""
    fields = {**SFTConfig.model_fields, **RLConfig.model_fields}
    planned = PlannedRun.model_fields
    assert set(planned) | READ_ELSEWHERE <= set(fields) | {"launch"}
    for name in ("prompts_per_step", "responses_per_prompt", "prompts_per_mini_batch"):
        assert planned[name].default == fields[name].default, name
    sections = {
        "sampling": [RLConfig],
        "rollout": [RLConfig],
        "data": [RLConfig, SFTConfig],
    }
    for name, configs in sections.items():
        theirs = {
            key: field
            for config in configs
            for key, field in config.model_fields[name].annotation.model_fields.items()
        }
        for key, field in planned[name].annotation.model_fields.items():
            assert field.get_default(call_default_factory=True) == theirs[key].get_default(
                call_default_factory=True
            ), f"{name}.{key}"

"""A real SGLang server answers from a released folder as transformers and the policy do."""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from klear_megatron.checkpoints.stages import Stage, read_stages, write_stages
from klear_megatron.config import write_config
from klear_megatron.conversion import hf_to_megatron, megatron_to_hf
from klear_megatron.conversion.command import checkpoint_in
from klear_megatron.conversion.logits import megatron_logits, transformers_logits
from klear_megatron.errors import UserError
from klear_megatron.evaluation import EvalConfig
from klear_megatron.evaluation.evaluate import read_evaluation
from klear_megatron.evaluation.stored import append_row, claim, folder_of
from klear_megatron.models.tokenizer import read_tokenizer
from klear_megatron.release import command, trial
from klear_megatron.release.model_card import model_card
from klear_megatron.release.release import release
from tests.conversion.folders import same_weights, weights_of
from tests.models import tiny

STAGES = [
    Stage(
        "Owner/Base", "supervised fine-tuning", 180, 2.5, ["openai/gsm8k"], "3 GPU h on 8 × H100"
    ),
    Stage("step_00000180", "reinforcement learning (gppo)", 2, None, ["a.jsonl", "b.jsonl"], None),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run, with the run's config and metrics."""
    folder = tmp_path_factory.mktemp("release")
    config = tiny.qwen3(num_hidden_layers=2, max_position_embeddings=32768)
    hf = tiny.write(folder / "base", config)
    tiny.write_tokenizer(hf)
    (hf / "chat_template.jinja").write_text(
        "{% for message in messages %}w5 {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}w6{% endif %}"
    )
    (hf / "LICENSE").write_text("Do as you like.\n")
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    run_config = {
        "run_dir": "/home/somebody/run",
        "policy": {"path": "/home/somebody/base", "optimizer": {"lr": 3e-5}},
        "data": {"path": "/home/somebody/sums.jsonl"},
        "steps": 3,
        "loss": {"name": "/home/somebody/my losses/loss.py:f"},
        "rollout": {"python": "/home/somebody/python"},
    }
    rows = [{"step": step, "reward/mean": step / 8} for step in (1, 2, 3)]
    rows[0] |= {"eval/sums/avg": 0.625, "eval/sums/standard_error": 0.05}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hf_to_megatron(hf, run / "checkpoints" / "step_00000002")
    write_stages(run / "checkpoints" / "step_00000002", STAGES)
    # What a run writes into its checkpoint counts. The run's own may be of later steps.
    (run / "config.yaml").write_text("policy: {path: another, optimizer: {lr: 1.0}}\n")
    in_checkpoint = run / "checkpoints" / "step_00000002" / "config.yaml"
    in_checkpoint.write_text(yaml.safe_dump(run_config))
    return in_checkpoint.parent


def test_release_is_complete_and_answers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Klear-Tiny"
    release(checkpoint, out, licence="apache-2.0", yarn=True)
    assert same_weights(weights_of(out), weights_of(checkpoint.parents[2] / "base"))
    sums = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out)
    assert sums.returncode == 0
    listed = {line.split()[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {file.name for file in out.iterdir()} - {"SHA256SUMS"}

    model = tiny.load(out)
    rope: dict[str, Any] = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 2.5, 5000.0)
    assert rope["original_max_position_embeddings"] == 32768
    assert model.config.max_position_embeddings == 81920
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.6, 0.95)

    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "| reward/mean | 0.25 |" in card
    assert "lr: 3.0e-05" in card
    head, _, folded = card.partition("<details>")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Owner/Base"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"with {count:,} parameters and a context of 81920 tokens" in head
    assert "The base model is `Owner/Base`. It was trained" in head
    assert (
        "| 1 | `Owner/Base` | supervised fine-tuning | 180 | `openai/gsm8k`, 2.5 epochs | "
        "3 GPU h on 8 × H100 |\n"
        "| 2 | stage 1 | reinforcement learning (gppo) | 2 | `a.jsonl`, `b.jsonl` | not known |\n"
    ) in head
    assert read_stages(out) == STAGES
    assert "Measured by the run, after step 1:" in head
    assert "| sums | 62.5% | 5.0% |" in head
    assert 'AutoTokenizer.from_pretrained("Klear-Tiny")' in head
    assert "```\nw5 What is 12 + 30? w6\n```" in head
    assert "lr: 3.0e-05" not in head
    assert len(head.splitlines()) < 60
    assert folded.count("</details>") == 2
    assert "somebody" not in card
    assert "name: loss.py:f" in folded
    assert "Licence: apache-2.0; the base model's text is in LICENSE." in card
    assert (out / "LICENSE").read_text() == "Do as you like.\n"

    assert not out.with_name("Klear-Tiny.logs").exists()

    # What SGLang answered, token by token, is what transformers generates.
    tokenizer = read_tokenizer(out)
    answers = [
        line.split(" -> ")[1] for line in capsys.readouterr().out.splitlines() if "->" in line
    ]
    assert len(answers) == 3
    prompt = tokenizer("w5 12 + 30 = w6", return_tensors="pt").input_ids
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=32, eos_token_id=1)
    assert answers[0] == repr(tokenizer.decode(tokens[0, prompt.shape[1] :]))


def test_both_spellings_of_the_licence_are_understood() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for option in ("--licence", "--license"):
        assert parser.parse_args(["run", "out", option, "mit"]).licence == "mit"


def test_a_folder_of_runs_is_no_run(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="is no run, but has some: run; give one of them"):
        checkpoint_in(checkpoint.parents[2])


def test_a_run_without_a_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint under checkpoints/"):
        checkpoint_in(tmp_path)


def test_yarn_is_refused_for_a_model_of_shorter_texts(tmp_path: Path) -> None:
    tiny.write(tmp_path / "base", tiny.qwen3(max_position_embeddings=256))
    hf_to_megatron(tmp_path / "base", tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"--yarn: .* 32768 tokens, .* is 256"):
        release(tmp_path / "checkpoint", tmp_path / "out", licence="mit", yarn=True)


@pytest.fixture(scope="module")
def answered(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[trial.Answer]]:
    """A bfloat16 folder of the checkpoint, and SGLang's answers from it."""
    folder = tmp_path_factory.mktemp("answered")
    megatron_to_hf(checkpoint, folder / "hf", dtype="bfloat16")
    return folder / "hf", trial.greedy_answers(folder / "hf", log_dir=folder / "logs")


def test_bfloat16_answers_are_those_of_the_policy(
    answered: tuple[Path, list[trial.Answer]], checkpoint: Path
) -> None:
    folder, answers = answered
    assert sum(len(answer.tokens) for answer in answers) > 30
    for reference in (
        transformers_logits(folder, "bfloat16"),
        megatron_logits(checkpoint, folder, "bfloat16"),
        megatron_logits(checkpoint, folder, "float32"),
    ):
        trial.check_answers(folder, answers, reference, "the reference")


def _exchange(weights: dict[str, torch.Tensor], name: str) -> None:
    """Swaps a tensor between two layers."""
    first, second = (f"model.layers.{layer}.{name}.weight" for layer in (0, 1))
    weights[first], weights[second] = weights[second], weights[first]


def _interleave(weights: dict[str, torch.Tensor]) -> None:
    """Reorders the query heads as if they were grouped differently."""
    name = "model.layers.0.self_attn.q_proj.weight"
    heads = weights[name].unflatten(0, (2, 4, -1))
    weights[name] = heads.transpose(0, 1).flatten(0, 2).contiguous()


WRONG = {
    "two layers' gates exchanged": lambda w: _exchange(w, "mlp.gate_proj"),
    "heads in another order": _interleave,
    "a norm left out": lambda w: w["model.norm.weight"].fill_(1.0),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_answers_of_wrong_weights_are_refused(
    mistake: str,
    answered: tuple[Path, list[trial.Answer]],
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    """Tests it in reverse: the folder is correct, and the policy has the wrong weights."""
    folder, answers = answered
    shutil.copytree(checkpoint / "hf", tmp_path / "hf")
    weights = load_file(checkpoint.parents[2] / "base" / "model.safetensors")
    WRONG[mistake](weights)
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    policy = megatron_logits(tmp_path / "megatron", folder, "bfloat16")
    with pytest.raises(UserError, match=r"rounding explains .* not fit to be released"):
        trial.check_answers(folder, answers, policy, "the policy")


def _evaluated(run_dir: Path, correct: list[bool]) -> Path:
    """A finished evaluation, with two samples of each problem."""
    config = EvalConfig.model_validate(
        {
            "model": "/home/somebody/rl-hf",
            "run_dir": run_dir,
            "benchmarks": {"sums": {"path": "sums.jsonl", "samples_per_problem": 2}},
            "sampling": {"temperature": 0.6, "max_response_length": 64},
        }
    )
    folder = folder_of(run_dir, "sums")
    claim(folder, {"problems": 2, "samples_per_problem": 2})
    for i, right in enumerate(correct):
        reward = {"correct": right, "formatted": True}
        row = {"index": i // 2, "reward": reward, "finish_reason": "stop", "tokens": 8}
        append_row(folder, row)
    write_config(config, run_dir / "config.yaml")
    return run_dir


def test_evaluations_made_apart_are_in_the_card(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    megatron_to_hf(checkpoint, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}')
    whole = read_evaluation(_evaluated(tmp_path / "eval", [True, True, True, False]))
    card = model_card(checkpoint, folder, "Klear-Tiny", "mit", [whole])
    assert (
        "Measured of `rl-hf` at temperature 0.6 with top_p 1, up to 64 tokens a response:\n\n"
        "| benchmark | accuracy | standard error |\n|---|---|---|\n| sums, avg@2 | 75.0% | 25.0% |"
    ) in card
    assert "somebody" not in card


def test_an_unfinished_evaluation_is_refused_first(checkpoint: Path, tmp_path: Path) -> None:
    half = _evaluated(tmp_path / "eval", [True, True, True])
    with pytest.raises(UserError, match="has 3 responses, and more are wanted"):
        release(checkpoint, tmp_path / "out", licence="mit", evaluations=[half])
    assert not (tmp_path / "out.untried").exists()


def test_missing_licence_text_is_said(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    megatron_to_hf(checkpoint, folder)
    (folder / "LICENSE").unlink()
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}')
    card = model_card(checkpoint, folder, "Klear-Tiny", "mit")
    assert "Licence: mit. The model this one started from came without its text." in card


def test_model_without_a_tokenizer_is_not_released(checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "step_00000002")
    for file in (broken / "SHA256SUMS", *(broken / "hf").glob("tokenizer*")):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        release(broken, tmp_path / "out", licence="apache-2.0")
    assert not (tmp_path / "out").exists()

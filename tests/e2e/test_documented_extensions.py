"""A chat template, an architecture, a reward and a loss of one's own work as docs/ shows them."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from klear_megatron.cli import main
from klear_megatron.config import Section, validate
from klear_megatron.losses.registry import LossConfig, resolve_loss
from klear_megatron.rewards import Job, RewardConfig, RewardPool
from tests.commands import ROOT
from tests.distributed.ranks import run_ranks
from tests.e2e.test_stop import command
from tests.losses.test_registry import inputs


def block(page: str, kind: str, containing: str) -> str:
    """The code block of this kind, on a page of docs/, that has such a text."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    found = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
    (code,) = [code for code in found if containing in code]
    return code


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with the files of the pages."""
    (tmp_path / "my_template.jinja").write_text(block("chat_templates", "jinja", "my_template"))
    (tmp_path / "my_architecture.py").write_text(block("architectures", "python", "MyModel"))
    (tmp_path / "my_reward.py").write_text(block("rewards", "python", "my_reward.py"))
    (tmp_path / "my_loss.py").write_text(block("losses", "python", "my_loss.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def my_base(quickstart: Path, folder: Path) -> Path:
    """The quickstart's base model as one of the page's architecture."""
    folder.mkdir()
    for file in (quickstart / "base").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    renamed = {f"my_{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["MyModelForCausalLM"]})
    )
    return folder


def test_a_template_and_an_architecture(make_config, quickstart, here, capsys):
    base = my_base(quickstart, here / "base")
    data = here / "sft.jsonl"
    messages = [
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "reasoning_content": "easy", "content": "2"},
    ]
    data.write_text((json.dumps({"messages": messages}) + "\n") * 2)
    policy = yaml.safe_load(block("chat_templates", "yaml", "chat_template"))["policy"]
    policy |= yaml.safe_load(block("architectures", "yaml", "imports"))["policy"]
    policy |= {"path": str(base), "dtype": "float32", "optimizer": {"lr": 1e-3}}
    config = make_config("sft", policy=policy, data={"path": str(data), "max_length": 256})
    ((code, said),) = run_ranks(1, command, ["sft", str(config), "--batch_size", "2"])
    assert code == 0, said

    run_dir = here / "sft"
    assert main(["convert", str(run_dir), str(here / "out")]) == 0
    assert (
        load_file(here / "out/model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    tokenizer = AutoTokenizer.from_pretrained(here / "out")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>easy</think>\n2<|im_end|>\n"
    )
    without = yaml.safe_load(config.read_text())
    del without["policy"]["imports"]
    config.write_text(yaml.safe_dump(without))
    plan = ["plan", str(config), "--gpus", "1", "--import", "my_architecture.py"]
    assert main(plan) == 0
    assert "it fits" in capsys.readouterr().out


def test_a_reward(here):
    settings = yaml.safe_load(block("rewards", "yaml", "my_reward.py"))
    config = validate(RewardConfig, settings["rewards"] | {"workers": 1}, "docs/rewards.md")
    short, long = "<think></think>\\boxed{4}", "<think></think>" + "so " * 100 + "\\boxed{4}"
    jobs = [Job("math", text, "4", response_length=len(text)) for text in (short, long)]
    with RewardPool(config) as pool:
        rewards = pool.grade(jobs)
    assert [reward.correct for reward in rewards] == [True, True]
    expected = [1 + 0.1 * (1 - len(short) / 200), 1.0]
    assert [reward.score for reward in rewards] == pytest.approx(expected)


class _Run(Section):
    loss: LossConfig


def test_a_loss(here):
    loss = validate(_Run, yaml.safe_load(block("losses", "yaml", "my_loss.py")), "docs").loss
    log_probs, advantages = torch.tensor([-1.0, -40.0]), torch.tensor([2.0, -1.0])
    result = resolve_loss(loss)(inputs(log_probs, log_probs, advantages))
    assert result.values.tolist() == [2.0, -10.0]
    assert result.metrics["floored"].tolist() == [False, True]

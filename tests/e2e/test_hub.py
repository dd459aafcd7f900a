"""The verbs that take a model by its name on the hub find it in the cache, without a network."""

from pathlib import Path

import pytest
import yaml

from klear_megatron.cli import main
from klear_megatron.curation import CurateConfig, curate
from klear_megatron.errors import UserError
from klear_megatron.launch.config import LaunchConfig
from klear_megatron.launch.job import Job
from klear_megatron.sft.config import SFTConfig
from tests.commands import ROOT
from tests.curation.test_curate import make_row, write
from tests.models import tiny

ABSENT = "owner/other: no such folder here, and no model of that name"
NO_SGLANG = {"python": "nowhere"}
"""Servers are refused once the model has been found."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the hub with the model owner/name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    model = tiny.write(repository / "snapshots" / "abc", tiny.qwen3(num_hidden_layers=2))
    tiny.write_tokenizer(model)
    template = "{% for m in messages %}w5 {{ m.content }} {% endfor %}w6"
    (model / "chat_template.jinja").write_text(template)
    return model


def test_serve(tmp_path, capsys):
    for model, message in (("name", "rollout.python: nowhere does not exist"), ("other", ABSENT)):
        config = {"model": f"owner/{model}", "run_dir": "serve", "rollout": NO_SGLANG}
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        assert main(["serve", "serve.yaml"]) == 2
        assert message in capsys.readouterr().err


def test_the_teacher_of_curate(tmp_path):
    for model, message in (("name", "rollout.python: nowhere does not exist"), ("other", ABSENT)):
        teacher = {"model": f"owner/{model}", "rollout": NO_SGLANG, "samples_per_prompt": 2}
        teacher |= {"max_prompt_length": 16, "sampling": {"max_response_length": 16}}
        config = CurateConfig.model_validate(
            {
                "path": write(tmp_path / "in.jsonl", [make_row("w1 w2")]),
                "output": tmp_path / f"{model}.jsonl",
                "pass_rate": {"teacher": teacher},
            }
        )
        with pytest.raises(UserError, match=message):
            curate(config)


def test_launch(tmp_path):
    launch = LaunchConfig(verb="sft", gpus_per_node=1, time="00:10:00")
    for model, is_planned in (("name", True), ("other", False)):
        config = SFTConfig.model_validate(
            {
                "run_dir": "run",
                "policy": {"path": f"owner/{model}", "optimizer": {"lr": 1e-3}},
                "data": {"path": "rows.jsonl", "max_length": 64},
                "batch_size": 2,
            }
        )
        planned = Job(launch, config, tmp_path / "snapshot", ROOT).plan()
        assert (planned is not None) is is_planned

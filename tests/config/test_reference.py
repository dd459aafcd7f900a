"""The reference of the settings is what the settings are, and a file to start from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from klear_megatron.cli import main
from klear_megatron.config import Section, load_config
from klear_megatron.config.reference import (
    FOLDER,
    commented_yaml,
    list_references,
    read_reference,
    sections_in,
)
from klear_megatron.rl.config import RLConfig
from klear_megatron.sft.config import SFTConfig
from tools.write_reference import CONFIGS, PAGE, page, references

AGAIN = "run: python -m tools.write_reference"


def test_reference_and_page_are_those_of_the_settings():
    texts = references()
    assert list_references() == sorted(CONFIGS)
    for verb, text in texts.items():
        assert read_reference(verb) == text, AGAIN
    assert PAGE.read_text() == page(texts), AGAIN


def test_a_setting_without_a_sentence_is_refused():
    class Silent(Section):
        number: int = 1

    with pytest.raises(ValueError, match="number: has no sentence"):
        commented_yaml(Silent)


def test_the_file_is_a_config_with_all_defaults(tmp_path):
    given = {
        "run_dir": "run",
        "steps": 1,
        "data": {"path": "a.jsonl"},
        "policy": {"path": "base", "optimizer": {"lr": 1e-6}},
    }
    overrides = "run_dir=run steps=1 data.path=a.jsonl policy.path=base policy.optimizer.lr=1e-6"
    assert load_config(RLConfig, FOLDER / "rl.yaml", overrides.split()) == RLConfig(**given)


def test_help_shows_the_settings_without_importing_torch():
    code = (
        "import sys; from klear_megatron.cli import main\n"
        "try: main(['rl', '--help'])\n"
        "finally: assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert (
        "# Highest learning rate, which the schedule reaches after the warm-up. (number > 0, "
        in (result.stdout)
    )
    assert "rollout:\n" in result.stdout


@pytest.mark.parametrize("option", [["--config", "no.yaml"], ["--config=no.yaml"]])
def test_the_file_may_be_given_as_an_option(option, capsys):
    assert main(["sft", "--epochs", "2", *option]) == 2
    assert "error: no.yaml: no such config file" in capsys.readouterr().err


def test_the_settings_that_other_trainers_have_are_settings_of_ours():
    table = (PAGE.parent / "coming_from.md").read_text()
    names = re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)
    assert len(names) > 25
    for name in names:
        section = [RLConfig, SFTConfig]
        for key in name.split("."):
            fields = [cls.model_fields[key] for cls in section if key in cls.model_fields]
            assert fields, name
            section = [inner for field in fields for inner in sections_in(field.annotation)]
